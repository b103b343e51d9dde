"""Wan2.2-T2V-A14B, two guided steps of the high-noise expert as it is, then four distilled ones of the low-noise one.

A recipe mixed by hand; pairs name the low-noise expert's choice first. The steps of each expert have a grid of their
own, which meet at the boundary (see `make_schedule`); UniPC ends there and Euler begins. Only the first two steps have
guidance, so eight forwards in all.
"""

from ml_collections import ConfigDict

from wan_jax import recipe


def get_config() -> ConfigDict:
    config = recipe("t2v-a14b-mixed")
    config.prompt = "Two cats in boxing gear and bright gloves fight on a spotlighted stage."
    return config
