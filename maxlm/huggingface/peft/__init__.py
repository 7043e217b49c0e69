"""PEFT's folders of an adapter: adapter_config.json and adapter_model.safetensors.

``settings`` reads the config, ``sites`` finds what it means in a model, ``reading``
matches that with the file, ``importing`` makes a run of it, ``writing`` goes back.
"""
