"""SFT and DPO on transformers.Trainer, with exact resume."""
