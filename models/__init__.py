"""What transformers knows of a model: its skeleton, its blocks, where each file tensor belongs, and the demo model."""
