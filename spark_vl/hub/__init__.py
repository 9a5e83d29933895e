"""What goes with a model to the Hugging Face Hub."""
