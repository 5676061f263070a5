"""Pictures, captions, text encoders and the VAE, and the two artefacts that they leave."""
