"""Video models that run chunk by chunk: a causal plug for Wan transformers and the key/value cache it reads."""
