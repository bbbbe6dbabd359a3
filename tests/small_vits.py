"""Every kind of ViT, small and with random weights, and images for it."""

import timm
import torch

SHAPE = dict(embed_dim=48, depth=3, num_heads=3, img_size=32, patch_size=8, num_classes=5)
#: A timm model of each kind of ViT, and what changes it beyond its size.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit of mean pooling": ("vit_base_patch16_gap_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "distilled deit": ("deit_tiny_distilled_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "norms of q, k and output": ("vit_tiny_patch16_224", dict(qk_norm=True, scale_attn_norm=True, qkv_bias=False)),
    "norms behind": ("vit_tiny_patch16_224", dict(block_fn=timm.models.vision_transformer.ResPostBlock)),
    "eva": ("eva_giant_patch14_224", {}),
    "eva-02": ("eva02_tiny_patch14_224", {}),
    "eva-02 of separate projections": ("eva02_base_patch16_clip_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "rotary positions of each block": ("vit_small_patch16_rope_mixed_224", {}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "grouped queries": (
        "vit_pe_core_tiny_patch16_384",
        dict(num_heads=4, num_kv_heads=2, qkv_fused=False, qk_norm=True, scale_attn_inner=True),
    ),
}


def shake(model, seed=0):
    """All parameters random: no bias, norm or layer scale stays at its starting value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small(family="vit", **changes):
    """A ViT of a family, always with the same random weights."""
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    return shake(timm.create_model(name, **{**SHAPE, **own, **changes}))


def images(height=32, width=32, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))
