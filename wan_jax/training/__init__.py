"""Training: a loop for any loss, and what fine-tuning a denoiser needs around it."""
