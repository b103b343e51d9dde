"""Functions that run once or twice on tiny models: XLA's optimising takes the time, and so they go without most."""

import functools

import jax
import pytest
from jax._src import compiler

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def known(name: str) -> bool:
    """Whether this version of XLA has the option."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options={name: OPTIONS[name]})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """For the tests of a folder whose conftest.py imports this. XLA_FLAGS would be for the whole process."""
    chosen = {name: value for name, value in OPTIONS.items() if known(name)}
    make = compiler.get_compile_options

    @functools.wraps(make)
    def quick(*args, env_options_overrides=None, **options):
        return make(*args, env_options_overrides={**chosen, **(env_options_overrides or {})}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick)
        yield
