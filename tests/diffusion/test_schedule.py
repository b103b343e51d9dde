"""Golden grids of the original programs, and what make_schedule refuses."""

import numpy as np
import pytest

from wan_jax.diffusion.schedule import GRIDS, make_schedule
from wan_jax.diffusion.segments import plan_steps
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick


def ints(text: str) -> list[int]:
    return [int(word) for word in text.split()]


# Recorded from the original schedulers: (schedule, solver, steps, shift) -> all timesteps.
GOLDEN_TIMESTEPS = {
    ("official", "unipc", 40, 12.0): ints(
        "999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877 "
        "865 852 837 819 799 776 749 717 678 631 571 492 386 235"
    ),
    ("diffusers", "unipc", 40, 12.0): ints(
        "999 997 995 993 990 988 985 982 979 976 973 969 965 961 957 952 947 942 936 930 923 915 907 898 889 878 "
        "866 852 837 820 800 777 750 719 680 633 573 496 391 242"
    ),
    ("official", "dpm++", 40, 12.0): ints(
        "1000 997 995 993 990 988 985 982 979 976 972 969 965 961 957 952 947 941 936 929 923 915 907 898 888 878 "
        "865 852 837 819 800 776 750 717 679 631 571 493 387 235"
    ),
    ("official", "unipc", 40, 5.0): ints(
        "999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 "
        "892 882 870 859 846 833 818 803 786 768 749 728 706 681 654 624 591 555 514 468 416 356 288 208 113"
    ),
    ("diffusers", "unipc", 40, 5.0): ints(
        "999 994 989 984 978 972 965 959 952 945 937 929 921 912 902 "
        "893 882 871 859 847 833 819 803 787 769 750 729 707 682 655 625 593 556 516 470 418 359 291 211 117"
    ),
    ("official", "unipc", 50, 5.0): ints(
        "999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843 833 821 "
        "809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92"
    ),
}

# The first sigmas, and the last ones before the final 0.
GOLDEN_SIGMAS = {
    ("official", "unipc", 40, 12.0): (
        [0.999916613, 0.997782648, 0.995546162, 0.993199646],
        [0.492880344, 0.38684696, 0.235109538],
    ),
    ("diffusers", "unipc", 40, 12.0): (
        [0.999998987, 0.997869968, 0.995637774, 0.993295789],
        [0.496464908, 0.39181006, 0.242431313],
    ),
    ("official", "dpm++", 40, 12.0): ([1, 0.997867823, 0.995633185], [0.387096763, 0.235294119]),
    ("official", "unipc", 40, 5.0): ([0.999799848], [0.11353305]),
    ("diffusers", "euler", 4, 5.0): ([1, 0.909707129], [0.717317462, 0.024414066]),  # shifted twice
}


@pytest.mark.parametrize("case", GOLDEN_TIMESTEPS, ids=str)
def test_golden_timesteps(case):
    timesteps = make_schedule(*case).timesteps
    assert timesteps.dtype == np.float32
    assert timesteps.tolist() == GOLDEN_TIMESTEPS[case]


def test_golden_ends_at_shift_8():
    timesteps = make_schedule("official", "unipc", 50, 8.0).timesteps.tolist()
    assert timesteps[:6] == [999, 997, 994, 991, 989, 986]
    assert timesteps[-5:] == [470, 409, 337, 249, 140]


@pytest.mark.parametrize("case", GOLDEN_SIGMAS, ids=str)
def test_golden_sigmas(case):
    sigmas = make_schedule(*case).sigmas
    first, last = GOLDEN_SIGMAS[case]
    assert sigmas.dtype == np.float32
    assert sigmas[-1] == 0
    # The goldens have nine digits, enough to name one float32: equal bits.
    np.testing.assert_array_equal(sigmas[: len(first)], np.float32(first))
    np.testing.assert_array_equal(sigmas[-1 - len(last) : -1], np.float32(last))


def test_euler_timesteps_are_fractions():
    schedule = make_schedule("diffusers", "euler", 4, 5.0)
    # float32: one rounding of the sigma and one of the product, half an ulp each.
    np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1].astype(np.float64), rtol=1.2e-7)
    assert not np.array_equal(schedule.timesteps, np.trunc(schedule.timesteps))


def test_official_euler_has_the_default_grid():
    euler, unipc = (make_schedule("official", solver, 7, 12.0) for solver in ("euler", "unipc"))
    np.testing.assert_array_equal(euler.sigmas, unipc.sigmas)
    np.testing.assert_array_equal(euler.timesteps, unipc.timesteps)


def test_lightx2v_four_steps():
    schedule = make_schedule("lightx2v", "euler", 4, 5.0)
    np.testing.assert_array_equal(schedule.sigmas, np.float32([1, 0.9375, 5 / 6, 0.625, 0]))
    np.testing.assert_array_equal(schedule.timesteps, np.float32([1000, 937.5, 5000 / 6, 625]))


@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_pair_of_steps_on_lightx2v_is_its_boundary_step_index(shift):
    schedule = make_schedule("lightx2v", "euler", (2, 2), shift)
    whole = make_schedule("lightx2v", "euler", 4, shift)
    np.testing.assert_array_equal(schedule.sigmas, whole.sigmas)
    np.testing.assert_array_equal(schedule.timesteps, whole.timesteps)
    assert (schedule.high_noise_steps, whole.high_noise_steps) == (2, None)
    # At shift 12 three of the four timesteps lie above the boundary of T2V; LightX2V still changes after two.
    assert plan_steps(schedule, 0.875) == ["high_noise"] * 2 + ["low_noise"] * 2
    assert plan_steps(whole, 0.875).count("high_noise") == (2 if shift == 5.0 else 3)


PAIRS = [
    ("official", "unipc"),
    ("official", ("euler", "dpm++")),
    ("diffusers", ("dpm++", "unipc")),
    (("lightx2v", "official"), ("euler", "unipc")),
    (("lightx2v", "diffusers"), "euler"),
]


@pytest.mark.parametrize(("kind", "solver"), PAIRS, ids=str)
@pytest.mark.parametrize(("boundary", "shift"), [(0.875, 5.0), (0.875, 12.0), (0.9, 5.0)])
def test_each_expert_has_its_part_of_the_grid(kind, solver, boundary, shift):
    schedule = make_schedule(kind, solver, (4, 2), shift, boundary)
    sigmas = schedule.sigmas.astype(np.float64)
    assert schedule.num_steps == 6
    assert sigmas[2] == np.float32(boundary)
    assert plan_steps(schedule, boundary) == ["high_noise"] * 2 + ["low_noise"] * 4
    kinds, solvers = ((each, each) if isinstance(each, str) else each for each in (kind, solver))
    assert schedule.sigmas[0] == make_schedule(kinds[1], solvers[1], 1, shift).sigmas[0]
    # Before the shift, either part is even. Near sigma 1 float32 has 6e-8, and undoing the shift multiplies by it.
    even = sigmas / (shift - (shift - 1) * sigmas)
    assert abs(even[1] - (even[0] + even[2]) / 2) < 1e-6
    np.testing.assert_allclose(even[2:], np.linspace(even[2], 0, 5), atol=1e-6)
    fractional = [*[kinds[1] == "diffusers" and solvers[1] == "euler"] * 2, *[kinds[0] == "lightx2v"] * 4]
    for timestep, sigma, kept in zip(schedule.timesteps, sigmas[:-1], fractional, strict=True):
        if kept:
            assert timestep == pytest.approx(1000 * sigma, abs=1e-4)
        else:
            assert timestep == int(timestep)
            assert -1e-4 < 1000 * sigma - timestep < 1


def test_the_part_of_the_low_noise_expert_is_what_it_always_was():
    """Golden: 1000 * 0.875 is kept whole, and the rest is cut."""
    schedule = make_schedule("official", ("euler", "unipc"), (4, 2), 5.0, 0.875)
    assert schedule.timesteps.tolist() == [999, 949, 875, 795, 673, 460]


def test_after():
    schedule = make_schedule("official", "unipc", (3, 2), 5.0, 0.875)
    rest = schedule.after(1)
    np.testing.assert_array_equal(rest.sigmas, schedule.sigmas[1:])
    np.testing.assert_array_equal(rest.timesteps, schedule.timesteps[1:])
    assert [schedule.after(step).high_noise_steps for step in (0, 1, 2, 3)] == [2, 1, 0, 0]


def test_timesteps_are_cut_not_rounded():
    # The official 40-step grid has 1000 * sigma = 999.917 first, which rounds to 1000.
    schedule = make_schedule("official", "unipc", 40, 12.0)
    assert (schedule.timesteps[0], round(1000 * float(schedule.sigmas[0]))) == (999, 1000)


@pytest.mark.parametrize(("shift", "steps"), [(12.0, 92), (8.0, 144), (5.0, 251)])
def test_duplicate_first_timesteps_keep_their_sigmas(shift, steps):
    """From these numbers of steps on, the first two timesteps are equal; the official scheduler then skips a sigma."""
    schedule = make_schedule("official", "unipc", steps, shift)
    assert schedule.timesteps[0] == schedule.timesteps[1]
    assert make_schedule("official", "unipc", steps - 1, shift).timesteps[1] < 999
    assert schedule.num_steps == steps
    assert len(np.unique(schedule.sigmas)) == steps + 1


@pytest.mark.parametrize(("kind", "solver"), [(kind, solver) for kind in GRIDS for solver in GRIDS[kind]])
@pytest.mark.parametrize("steps", [1, 2, 3, 40, 1000])
@pytest.mark.parametrize("shift", [0.3, 1.0, 12.0])
def test_every_grid_falls_to_zero(kind, solver, steps, shift):
    schedule = make_schedule(kind, solver, steps, shift)
    assert schedule.sigmas.shape == (steps + 1,)
    assert schedule.timesteps.shape == (steps,)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32
    assert schedule.sigmas[0] <= 1
    assert schedule.sigmas[-1] == 0
    assert (np.diff(schedule.sigmas) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("oficial", "unipc", 40, 12.0), r"unknown schedule 'oficial'; did you mean 'official'\? \(known: official, "),
        (("official", "dpm+", 40, 12.0), "unknown solver .*'dpm\\+'; did you mean 'dpm\\+\\+'"),
        (("lightx2v", "unipc", 4, 5.0), "unknown solver for schedule 'lightx2v': 'unipc'; did you mean 'euler'"),
        (("official", "unipc", 0, 12.0), "steps is 0"),
        (("official", "unipc", 2.5, 12.0), "steps is 2.5"),
        (("official", "unipc", 40, 0.0), "shift is 0.0"),
        (("official", "unipc", 40, float("nan")), "shift is nan"),
        (("official", "unipc", 40, float("inf")), "shift is inf"),
        (("official", "unipc", 1000, 1e6), "repeat a sigma"),
        (("official", "unipc", (4, 0), 5.0, 0.875), "steps is 0"),
        (("official", "unipc", (4, 2), 5.0), "steps 4,2 are for two experts but the model has one"),
        (("official", "unipc", (4, 2), 5.0, 1.0), "boundary 1.0 leaves one expert no steps"),
        (("official", "unipc", (4, 2), 5.0, 0.0), "boundary 0.0 leaves one expert no steps"),
        ((("lightx2v", "official"), "euler", 4, 5.0), "schedules lightx2v,official need the steps of each expert"),
        (("official", ("euler", "dpm"), 4, 5.0), "unknown solver for schedule 'official': 'dpm'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        make_schedule(*arguments)
    assert "\n" not in str(error.value)
