"""The metadata service: the truth about names."""
