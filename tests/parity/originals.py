"""Small random PyTorch originals: whole diffusers pipelines of awkward dims, and the trees they save."""

import pathlib

import numpy as np
import torch


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every parameter, norms and tables too, so that none is left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "norm" in name or "gamma" in name:
                offset = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(offset + 0.1 * noise)
            else:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))
    return module.eval()


def denoiser(seed: int, **changes):
    """3 heads of 20: 20 does not divide into thirds; 52 is no multiple of anything near."""
    from diffusers import WanTransformer3DModel

    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 20,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 28,
        "freq_dim": 64,
        "ffn_dim": 52,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 64,
    }
    return randomise(WanTransformer3DModel(**(config | changes)), seed)


def vae(seed: int, **changes):
    from diffusers import AutoencoderKLWan

    config = {
        "base_dim": 6,
        "z_dim": 16,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return randomise(AutoencoderKLWan(**(config | changes)), seed)


def vae_2_2(seed: int, **changes):
    """TI2V-5B's structure: 48 channels of latents of 16 x 16 pixels, a wider decoder, patches of 2 x 2 pixels."""
    config = {
        "base_dim": 6,
        "decoder_base_dim": 8,
        "z_dim": 48,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": np.linspace(-0.5, 0.4, 48).tolist(),
        "latents_std": np.linspace(0.4, 1.6, 48).tolist(),
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
    }
    return vae(seed, **(config | changes))


def image_encoder(seed: int, **changes):
    """CLIP's vision tower: 3 layers, 16 patches of an image and one token for the whole."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = {
        "hidden_size": 22,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    return randomise(CLIPVisionModel(CLIPVisionConfig(**(config | changes))), seed)


def text_encoder(seed: int, vocab_size: int, **changes):
    from transformers import UMT5Config, UMT5EncoderModel

    config = {
        "vocab_size": vocab_size,
        "d_model": 28,
        "d_kv": 6,
        "d_ff": 44,
        "num_layers": 2,
        "num_heads": 5,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    model = randomise(UMT5EncoderModel(UMT5Config(**(config | changes))), seed)
    # transformers 5 can leave the two copies of the embedding untied.
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def scheduler(solver: str, shift: float):
    """What diffusers has for each of our solvers."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "unipc":
        return UniPCMultistepScheduler(**flow)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**flow)
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def pipeline(tokenizer_folder: pathlib.Path, *, experts: int = 2, solver: str = "unipc", shift: float = 3.0):
    """A whole diffusers WanPipeline of Wan2.2's structure (or 2.1's, with one expert), float32."""
    from diffusers import WanPipeline

    return WanPipeline(
        **_text_models(tokenizer_folder),
        transformer=denoiser(2),
        transformer_2=denoiser(3) if experts == 2 else None,
        vae=vae(4),
        scheduler=scheduler(solver, shift),
        boundary_ratio=0.875 if experts == 2 else None,
    )


def image_pipeline(tokenizer_folder: pathlib.Path, model: str, *, solver: str = "unipc", shift: float = 5.0):
    """A whole diffusers pipeline that takes an image, float32.

    `model`: "i2v-a14b" (two experts, mask and image latents), "i2v-14b" (one, and CLIP), "flf2v-14b" (CLIP of two
    images) or "ti2v-5b" (VAE 2.2, first frame given).
    """
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    models = _text_models(tokenizer_folder) | {"scheduler": scheduler(solver, shift)}
    if model == "ti2v-5b":
        changes = {"in_channels": 48, "out_channels": 48}
        models |= {"vae": vae_2_2(4), "transformer": denoiser(2, **changes), "expand_timesteps": True}
    elif model == "i2v-a14b":
        experts = {"transformer": denoiser(2, in_channels=36), "transformer_2": denoiser(3, in_channels=36)}
        models |= {"vae": vae(4), **experts, "boundary_ratio": 0.9}
    else:
        clip = image_encoder(5)
        changes = {"in_channels": 36, "image_dim": clip.config.hidden_size, "added_kv_proj_dim": 60}
        if model == "flf2v-14b":
            changes["pos_embed_seq_len"] = 2 * clip.embeddings.num_positions
        size = clip.config.image_size
        models |= {
            "vae": vae(4),
            "transformer": denoiser(2, **changes),
            "image_encoder": clip,
            "image_processor": CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
        }
    return WanImageToVideoPipeline(**models)


def _text_models(tokenizer_folder: pathlib.Path) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return {"tokenizer": tokenizer, "text_encoder": text_encoder(1, vocab_size=len(tokenizer) + 3)}


def relative_error(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, in the Euclidean norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
