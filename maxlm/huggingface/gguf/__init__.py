"""GGUF files, llama.cpp's: one file that holds a model's settings, tensors and
tokenizer, read as the Hugging Face model that it stands for and written from a run.

The format is docs/gguf.md of github.com/ggml-org/ggml; names and values are those that
llama.cpp's conversion scripts write.
"""
