"""Schedules, solvers, guidance and the one denoise loop."""
