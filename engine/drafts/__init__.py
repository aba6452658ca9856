"""Drafts: tokens that something cheap proposes, and that one step of the model checks."""
