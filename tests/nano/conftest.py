"""These tests compile more than they compute."""

from tests.quick_compiles import quick_compiles

__all__ = ["quick_compiles"]
