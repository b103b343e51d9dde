"""Spreading models and data over several devices."""
