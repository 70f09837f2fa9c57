"""Every partition and every router, over the tables: a method that is registered is tested."""

from __future__ import annotations

import pytest
import torch

from lamella.architecture.sizes import Parts
from lamella.calibrate.sample import choose, expert_norms, router_logits, rows, weights_only
from lamella.conversion.partition import PARTITIONS, ROUTERS
from lamella.conversion.partition.reconstruct import dense_output, reconstruct, relative_error
from lamella.errors import UserError
from lamella.recipe.methods import partition as axes
from support.partition_samples import D, F, T, generator, sample_of

SPLITS = [Parts(8, 0, 3), Parts(8, 2, 4), Parts(4, 1, 2), Parts(48, 5, 10)]
OVERLAPPING = {"gradient-sharing"}
NEEDS_SAMPLE = {name for name, choice in axes.PARTITIONS.items() if choice.needs_sample}
NEEDS_GRADIENT = {name for name, choice in axes.PARTITIONS.items() if choice.needs_gradient}
ROUTERS_NEED_SAMPLE = {name for name, choice in axes.ROUTERS.items() if choice.needs_sample}


@pytest.mark.parametrize("parts", SPLITS, ids=str)
@pytest.mark.parametrize("name", PARTITIONS)
def test_every_neuron_is_in_one_part(name, parts):
    partition = PARTITIONS[name](sample_of(), parts, generator())
    f = F // parts.num_parts
    assert partition.shared_n.shape == (parts.num_shared * f,)
    assert partition.experts_Ef.shape == (parts.num_routed, f)
    assert partition.shared_n.dtype == partition.experts_Ef.dtype == torch.int64
    assert torch.equal(partition.shared_n, partition.shared_n.sort().values)
    assert torch.equal(partition.experts_Ef, partition.experts_Ef.sort(dim=1).values)
    if name in OVERLAPPING:
        assert not torch.isin(partition.experts_Ef, partition.shared_n).any()
        assert all(len(row.unique()) == f for row in partition.experts_Ef)
    else:
        everyone = torch.cat([partition.shared_n, partition.experts_Ef.flatten()])
        assert torch.equal(everyone.sort().values, torch.arange(F))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", sorted(PARTITIONS.keys() - OVERLAPPING))
def test_all_experts_together_are_the_dense_layer(name, gated):
    sample = sample_of(gated)
    partition = PARTITIONS[name](sample, Parts(8, 2, 8), generator())
    everyone_TK = torch.arange(6).expand(T, 6)
    # fp32, another order of summation
    torch.testing.assert_close(reconstruct(sample, partition, everyone_TK), dense_output(sample), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", sorted(PARTITIONS.keys() - NEEDS_SAMPLE))
def test_methods_that_need_no_sample_work_without_one(name):
    sample, parts = sample_of(), Parts(8, 2, 4)
    with_tokens = PARTITIONS[name](sample, parts, generator())
    without = PARTITIONS[name](weights_only(sample.ffn), parts, generator())
    assert torch.equal(with_tokens.experts_Ef, without.experts_Ef)


@pytest.mark.parametrize("name", PARTITIONS)
def test_only_the_named_methods_need_a_gradient(name):
    sample = sample_of(gradient=False)
    if name in NEEDS_GRADIENT:
        with pytest.raises(UserError, match="gradient"):
            PARTITIONS[name](sample, Parts(8, 2, 4), generator())
    else:
        PARTITIONS[name](sample, Parts(8, 2, 4), generator())


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_is_decided_by_its_generator(name):
    first, second = (PARTITIONS[name](sample_of(), Parts(8, 2, 4), generator(3)) for _ in range(2))
    assert torch.equal(first.experts_Ef, second.experts_Ef)


@pytest.mark.parametrize("parts", [Parts(7, 1, 3), Parts(1, 0, 1), Parts(8, 4, 4), Parts(8, -1, 4), Parts(8, 0, 9)])
@pytest.mark.parametrize("name", PARTITIONS)
def test_impossible_parts_are_refused(name, parts):
    with pytest.raises(UserError, match="choose"):
        PARTITIONS[name](sample_of(), parts, generator())


@pytest.mark.parametrize("partition_name", ["random", "gradient-sharing"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_experts_by_finite_logits(name, partition_name):
    sample, parts = sample_of(), Parts(8, 2, 4)
    partition = PARTITIONS[partition_name](sample, parts, generator())
    router = ROUTERS[name](sample, partition, parts.num_chosen, generator())
    assert router.weight_ED.shape == (6, D)
    assert router.bias_E.shape == (6,)
    logits_TE = router_logits(router, sample.x_TD)
    assert logits_TE.shape == (T, 6)
    assert torch.isfinite(logits_TE).all()
    assert choose(logits_TE, 2).shape == (T, 2)


@pytest.mark.parametrize("name", sorted(ROUTERS.keys() - ROUTERS_NEED_SAMPLE))
def test_routers_that_need_no_sample_work_without_one(name):
    sample = sample_of()
    partition = PARTITIONS["contiguous"](sample, Parts(8, 2, 4), generator())
    router = ROUTERS[name](weights_only(sample.ffn), partition, 2, generator())
    assert router.weight_ED.shape == (6, D)


@pytest.mark.parametrize("name", sorted(ROUTERS_NEED_SAMPLE))
def test_a_calibrated_router_beats_a_random_choice_on_new_tokens(name):
    """The topics are the same in both halves, so a router that learnt something carries it over."""
    sample, parts = sample_of(), Parts(8, 0, 3)
    partition = PARTITIONS["coactivation"](sample, parts, generator())
    fit, new = rows(sample, slice(0, T // 2)), rows(sample, slice(T // 2, T))
    router = ROUTERS[name](fit._replace(dh_TF=None), partition, 3, generator())
    kept_TE = expert_norms(new, partition)
    chosen = kept_TE.gather(1, choose(router_logits(router, new.x_TD), 3)).sum()
    assert chosen > 1.05 * kept_TE.mean() * 3 * len(kept_TE)


def test_the_analytic_router_needs_a_gate():
    sample = sample_of(gated=False)
    partition = PARTITIONS["random"](sample, Parts(8, 2, 4), generator())
    with pytest.raises(UserError, match="gate"):
        ROUTERS["analytic"](sample, partition, 2, generator())


def test_coadapted_and_ridge_recover_most_of_the_way_to_the_oracle_where_topics_decide():
    """A split by topic leaves a linear router nearly nothing to miss."""
    sample, parts = sample_of(), Parts(8, 2, 4)
    from lamella.conversion.partition.oracle import largest

    partition = PARTITIONS["coadapted"](sample, parts, generator())
    router = ROUTERS["ridge"](sample, partition, 2, generator())

    def error(ids_TK: torch.Tensor) -> float:
        return relative_error(dense_output(sample), reconstruct(sample, partition, ids_TK))

    oracle = error(largest(sample, partition, 2))
    routed = error(choose(router_logits(router, sample.x_TD), 2))
    chance = error(choose(torch.rand(T, 6, generator=generator()), 2))
    assert routed - oracle < 0.4 * (chance - oracle)
