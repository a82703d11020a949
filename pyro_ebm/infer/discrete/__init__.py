"""Objectives for discrete data that compare every event with its neighbours."""
