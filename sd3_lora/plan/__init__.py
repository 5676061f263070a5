"""What is kept where, what that takes, and how a step is carried out."""
