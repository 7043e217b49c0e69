"""Adapters: small trained parts beside a model's own parameters."""
