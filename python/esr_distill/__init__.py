"""On-policy distillation with Early Stopping Rollout: a thin training loop on transformers models."""
