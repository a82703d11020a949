"""Inference of parameters whose log Z is out of reach, by auxiliary draws in its place."""
