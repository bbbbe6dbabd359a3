"""Features on the way, as timm and its users ask for them: intermediates, pruning, maps, gradient checkpointing."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from small_models import images, small


def block_outputs(model, x):
    """What each block gave, as (patches, class token), from hooks: the truth for every way to ask for features."""
    outputs = []
    hooks = [b.register_forward_hook(lambda _m, _i, y: outputs.append((y[:, :-1], y[:, -1:]))) for b in model.layers]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return outputs


def as_map(patches, grid):
    return patches.transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize(
    ("indices", "taken"),
    [(None, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), ([0, 2], [0, 2]), ((-3, -1), [1, 3]), ([1], [1])],
    ids=str,
)
@pytest.mark.parametrize("output_dict", [False, True])
def test_forward_intermediates_with_every_argument(indices, taken, output_dict):
    model, x, grid = small(), images(48, 80), (3, 5)
    for prefix, norm, stop, fmt, only in itertools.product(*[[False, True]] * 3, ["NCHW", "NLC"], [False, True]):
        options = dict(return_prefix_tokens=prefix, norm=norm, stop_early=stop, output_fmt=fmt, intermediates_only=only)
        with torch.no_grad():
            truth = block_outputs(model, x)
            last_run = truth[taken[-1] if stop else -1]
            final = model.norm_f(torch.cat(last_run[::-1], 1))
            wanted = [[model.norm_f(t) if norm else t for t in truth[n]] for n in taken]
            wanted = [(as_map(patches, grid) if fmt == "NCHW" else patches, token) for patches, token in wanted]
            got = model.forward_intermediates(x, indices, output_dict=output_dict, **options)
        patches, tokens = [p for p, _ in wanted], [t for _, t in wanted]
        if output_dict:
            want = {"image_intermediates": patches}
            want |= {"image_intermediates_prefix": tokens} if prefix else {}
            want |= {} if only else {"image_features": final}
        else:
            want = wanted if prefix else patches
            want = want if only else (final, want)
        assert type(got) is type(want)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("indices", [0, 5, [4], [-5]], ids=str)
def test_blocks_that_do_not_exist_are_refused(indices):
    with pytest.raises(AssertionError, match="out of range"):
        small().forward_intermediates(images(), indices)


@pytest.mark.parametrize("n", [1, 3, [0, 2], (1, -1)], ids=str)
def test_get_intermediate_layers_is_forward_intermediates(n):
    model, x = small(), images(48, 80)
    for reshape, prefix, norm in itertools.product([False, True], repeat=3):
        with torch.no_grad():
            got = model.get_intermediate_layers(x, n=n, reshape=reshape, return_prefix_tokens=prefix, norm=norm)
            options = dict(return_prefix_tokens=prefix, norm=norm, output_fmt="NCHW" if reshape else "NLC")
            want = model.forward_intermediates(x, n, intermediates_only=True, **options)
        assert len(got) == (n if isinstance(n, int) else len(n))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_pruned_model_gives_the_same_taps_and_uses_all_it_keeps(last):
    model, x = small(drop_rate=0.5), images()
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    for prune_norm, want in ((True, taps[last]), (False, normed[last])):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([last - 4], prune_norm=prune_norm)
        assert taken == [last]
        assert len(pruned.layers) == last + 1
        assert {m.training for name, m in pruned.named_modules() if name != "layers"} == {False}, "a list does not care"
        with torch.no_grad():
            (got,) = pruned.forward_intermediates(x, taken, norm=not prune_norm, intermediates_only=True)
            assert torch.equal(got, want)
            assert torch.equal(as_map(pruned(x)[:, 1:], (4, 4)), want), "the features end at the tap"
        features = pruned.train().forward_intermediates(x, taken, norm=not prune_norm, return_prefix_tokens=True)[1][0]
        sum(f.sum() for f in features).backward()
        assert [name for name, parameter in pruned.named_parameters() if parameter.grad is None] == []


def test_pruning_to_the_last_block_without_the_head_changes_nothing():
    model, x = small(), images()
    with torch.no_grad():
        logits = model(x)
        assert model.prune_intermediate_layers(1, prune_head=False) == [3]
        assert torch.equal(model(x), logits)


@pytest.mark.parametrize(
    ("out_indices", "blocks"), [(None, [1, 2, 3]), ((0, 2), [0, 2]), ((-4,), [0]), (2, [2, 3])], ids=str
)
def test_features_only_gives_maps(out_indices, blocks):
    x = images(96, 160)
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    extractor, model = small(features_only=True, **chosen), small()
    with torch.no_grad():
        maps = extractor(x)
        want = [as_map(block_outputs(model, x)[n][0], (6, 10)) for n in blocks]
    assert extractor.feature_info.channels() == [64] * len(blocks)
    assert extractor.feature_info.reduction() == [16] * len(blocks)
    assert [info["module"] for info in extractor.feature_info.get_dicts()] == [f"layers.{n}" for n in blocks]
    torch.testing.assert_close(maps, want)


@pytest.mark.parametrize("features_only", [False, True])
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(features_only):
    found = []
    for enable in (False, True):
        model = small(features_only=features_only).train()
        backbone = model.model if features_only else model
        backbone.set_grad_checkpointing(enable)
        assert backbone.grad_checkpointing is enable
        y = model(images())
        loss = sum(f.square().mean() for f in y) if features_only else F.cross_entropy(y, torch.tensor([1, 5]))
        loss.backward()
        found.append((y, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
