"""The saved model: one self-describing blob a tensor, in an ordinary folder of safetensors files."""
