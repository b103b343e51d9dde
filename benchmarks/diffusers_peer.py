"""The peer's model, as every benchmark makes it."""

from typing import Any

from wan_jax.config import DenoiserConfig


def diffusers_denoiser(config: DenoiserConfig, device: Any) -> Any:
    """Diffusers' denoiser with our config and random weights, in torch's default dtype, in evaluation mode.

    Constructed under the device's context; call it outside: torch.compile does not know its way through that.
    """
    from diffusers import WanTransformer3DModel

    with device:
        model: Any = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            cross_attn_norm=True,
            rope_max_seq_len=1024,
        )
    return model.eval()
