"""Train a policy with DPO on TRL."""
