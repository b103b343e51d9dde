"""Frozen descriptions of every model. Their defaults are Wan2.2-T2V-A14B; presets.py has the official releases."""

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from wan_jax.errors import InputError, unknown_name

T = TypeVar("T")


class PerExpert(NamedTuple, Generic[T]):
    """A choice for each of two experts: a pair in the order of the official configs."""

    low: T
    high: T

    def __str__(self) -> str:
        return f"({self.low}, {self.high})"


@dataclass(frozen=True)
class DenoiserConfig:
    """The diffusion transformer (one expert)."""

    num_layers: int = 40
    dim: int = 5120
    num_heads: int = 40
    ffn_dim: int = 13824
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, height, width of latents in one token
    text_dim: int = 4096  # width of the text encoder's output
    text_length: int = 512  # tokens of context; shorter prompts are padded with zero vectors, which are attended
    freq_dim: int = 256  # width of the timestep sinusoid
    eps: float = 1e-6
    image_dim: int | None = None  # width of the image encoder's features (Wan2.1 I2V); None: no attention to images
    image_position_length: int | None = None  # image tokens with learned positions (FLF2V: two images); None: none

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise InputError(
                f"denoiser dim {self.dim} does not split into {self.num_heads} heads of an even width; check the config"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class TextEncoderConfig:
    """The UMT5 encoder."""

    vocab_size: int = 256384
    dim: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class ImageEncoderConfig:
    """The vision tower of CLIP (open-clip's XLM-RoBERTa-large ViT-H/14) that Wan2.1's image to video attends to."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    num_layers: int = 32  # all of the tower's; Wan reads what goes into the last one
    num_heads: int = 16
    ffn_dim: int = 5120
    eps: float = 1e-5

    def __post_init__(self):
        if self.dim % self.num_heads or self.image_size % self.patch_size:
            raise InputError(
                f"image encoder dim {self.dim} must divide by its {self.num_heads} heads and image_size "
                f"{self.image_size} by patch_size {self.patch_size}; check the config"
            )

    @property
    def num_tokens(self) -> int:
        """One for each patch of an image, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


# Normalisation of the latents' 16 channels (Wan-Video/Wan2.2: wan/modules/vae2_1.py).
WAN21_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """A causal 3-D video VAE: that of Wan2.1, or with `residual` that of Wan2.2."""

    z_dim: int = 16
    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: base_dim
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # per spatial halving: is time halved too
    patch_size: int = 1  # side of the squares of pixels that become channels before anything else
    residual: bool = False  # each stage has a shortcut beside it, and upsampling keeps the channels
    latents_mean: tuple[float, ...] = WAN21_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN21_LATENTS_STD

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise InputError(
                f"VAE config has {len(self.temporal_downsample)} temporal_downsample flags for {len(self.dim_mult)} "
                "stages; it needs one fewer than stages"
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim or min(self.latents_std) <= 0:
            raise InputError(f"VAE config needs {self.z_dim} (its z_dim) latents_mean and positive latents_std values")
        if self.residual:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        folded = {None: 1, False: 4, True: 8}  # pixels and frames that a stage makes one of
        counts = [(before * folded[temporal], after) for before, after, temporal in self.encoder_stages]
        counts += [(after * folded[temporal], before) for before, after, temporal in self.decoder_stages[:-1]]
        if any(many % few for many, few in counts):
            raise InputError(
                f"VAE config with shortcuts has base_dim {self.base_dim} and dim_mult {self.dim_mult}: the channels of "
                "a stage do not divide by those before it; check the config"
            )

    @property
    def encoder_stages(self) -> tuple[tuple[int, int, bool | None], ...]:
        """Of each stage: channels before, channels after, and whether it halves time beside space (None: neither)."""
        widths = [self.base_dim * multiple for multiple in (1, *self.dim_mult)]
        return tuple(zip(widths[:-1], widths[1:], (*self.temporal_downsample, None), strict=True))

    @property
    def decoder_stages(self) -> tuple[tuple[int, int, bool | None], ...]:
        """Of each stage: channels before, channels inside, and whether it doubles time beside space (None: neither).

        Upsampling halves the channels, unless the VAE is `residual`.
        """
        base_dim = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        widths = [base_dim * multiple for multiple in reversed(self.dim_mult)]
        upsampled = [width if self.residual else width // 2 for width in widths]
        inputs = (widths[0], *upsampled[:-1])
        return tuple(zip(inputs, widths, (*reversed(self.temporal_downsample), None), strict=True))

    @property
    def full_rate_stages(self) -> int:
        """Stages of the encoder before the first that halves time. The decoder has one more after the last doubling."""
        return [*self.temporal_downsample, True].index(True)

    @property
    def image_channels(self) -> int:
        """Of a frame, once its pixels are folded."""
        return 3 * self.patch_size**2

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


# wan/configs/shared_config.py: sample_neg_prompt.
OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


@dataclass(frozen=True)
class SamplingConfig:
    """What a run uses where the user says nothing."""

    size: tuple[int, int] = (1280, 720)  # width, height in pixels
    frames: int = 81
    fps: int = 16
    steps: int = 40
    shift: float = 12.0
    guidance: PerExpert[float] = PerExpert(low=3.0, high=4.0)
    boundary: float | None = 0.875  # timesteps >= 1000 * boundary go to the high-noise expert; None: one expert
    solver: str = "unipc"
    schedule: str = "official"
    negative_prompt: str = OFFICIAL_NEGATIVE_PROMPT


ModelConfig = DenoiserConfig | TextEncoderConfig | VAEConfig | ImageEncoderConfig

# What a model is given beside the noise:
#   text           the prompt alone;
#   image_latents  a mask and the latents of given frames, concatenated to the noise along channels;
#   first_frame    the prompt alone, or the first latent frame in the noise's place, with timestep 0 for its tokens.
CONDITIONINGS = ("text", "image_latents", "first_frame")


@dataclass(frozen=True)
class WanConfig:
    """Everything that defines one member of the family."""

    name: str = "t2v-a14b"
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_encoder: ImageEncoderConfig | None = None  # for denoisers that attend to images
    conditioning: str = "text"  # one of CONDITIONINGS

    def __post_init__(self):
        if self.conditioning not in CONDITIONINGS:
            raise unknown_name("conditioning", self.conditioning, CONDITIONINGS)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the denoisers in the order in which sampling uses them."""
        return ("high_noise", "low_noise") if self.sampling.boundary is not None else ("denoiser",)

    def model(self, component: str) -> ModelConfig:
        """The config of "text_encoder", "vae", "image_encoder" or a denoiser ("high_noise", "low_noise", "denoiser").

        Raises ValueError for the image encoder of a model that has none.
        """
        if component == "image_encoder" and self.image_encoder is None:
            raise ValueError(f"{self.name} has no image encoder")
        others: dict[str, ModelConfig | None] = {
            "text_encoder": self.text_encoder,
            "vae": self.vae,
            "image_encoder": self.image_encoder,
        }
        return others.get(component) or self.denoiser

    @property
    def size_multiple(self) -> tuple[int, int]:
        """(height, width) in pixels covered by one token: sizes must be multiples of these."""
        _, patch_height, patch_width = self.denoiser.patch_size
        return patch_height * self.vae.spatial_stride, patch_width * self.vae.spatial_stride
