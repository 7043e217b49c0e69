"""Using a trained model: cache, prefill and decode, sampling, the generation loop."""
