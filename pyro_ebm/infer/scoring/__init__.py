"""What learning objectives share: scoring EBM sites by a contrast, and checks of the step."""
