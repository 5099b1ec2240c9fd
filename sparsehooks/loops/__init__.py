"""The loops that drive a session: Trainer, Accelerate and plain loops, and no loop at all."""
