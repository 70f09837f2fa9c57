"""Assignment, clusters, ridge, oracle, baselines, alignment and the search, against definitions and brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from transformers.activations import ACT2FN

from lamella.architecture.sizes import Parts
from lamella.calibrate.sample import ACTIVATIONS, Partition, expert_norms, expert_outputs, hidden, output
from lamella.conversion.partition import PARTITIONS, ROUTERS
from lamella.conversion.partition.align import alignment, residual_bias
from lamella.conversion.partition.assign import balanced_assign
from lamella.conversion.partition.clusters import balanced_kmeans, token_clusters
from lamella.conversion.partition.coactivation import marker_distances
from lamella.conversion.partition.gradient import gradient_mass
from lamella.conversion.partition.oracle import best, largest
from lamella.conversion.partition.reconstruct import dense_output, reconstruct, relative_error
from lamella.conversion.partition.refit import refit_down
from lamella.conversion.partition.ridge import RidgeProblem
from lamella.conversion.partition.search import search_shared, split_tokens
from lamella.conversion.partition.static import IMPORTANCES, flap, kept_output, static
from lamella.errors import UserError
from support.partition_samples import D, F, T, generator, sample_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    torch.testing.assert_close(ACTIVATIONS[name](normal(100)), ACT2FN[name](normal(100)))


def test_an_unknown_activation_is_refused():
    ffn = sample_of().ffn._replace(activation="gelu_nwe")
    with pytest.raises(UserError, match="gelu_new"):
        hidden(ffn, normal(3, D))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("items", "groups"), [(64, 4), (60, 7), (5, 5), (3, 5)])
def test_balanced_assignment_keeps_the_capacity(exact, items, groups):
    capacity = -(-items // groups)
    group_N = balanced_assign(normal(items, groups), capacity, exact)
    assert group_N.shape == (items,)
    assert group_N.bincount(minlength=groups).max() <= capacity


def test_exact_assignment_is_the_best_of_all():
    cost_NE = normal(6, 3)
    found = cost_NE.gather(1, balanced_assign(cost_NE, 2)[:, None]).sum()
    everything = torch.cartesian_prod(*[torch.arange(3)] * 6)
    balanced = everything[[bool((row.bincount(minlength=3) == 2).all()) for row in everything]]
    torch.testing.assert_close(found, min(cost_NE[torch.arange(6), row].sum() for row in balanced))


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_assignment_by_prices_is_nearly_as_good_as_the_exact_one(skew):
    """`skew` makes one group the cheapest for nearly everyone, which a greedy fill gets wrong."""
    cost_NE = normal(600, 8) - skew * torch.eye(8)[0]
    cheapest = cost_NE.min(1).values.sum()

    def excess(exact: bool) -> float:
        return (cost_NE.gather(1, balanced_assign(cost_NE, 75, exact)[:, None]).sum() - cheapest).item()

    # Prices leave a few items where they do not belong; 1e-3: a sum of 600 costs in fp32.
    assert excess(True) - 1e-3 <= excess(False) <= 1.01 * excess(True) + 0.5


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_finds_separate_clusters(metric):
    truth_N = torch.arange(80) % 4
    points_ND = 10 * torch.eye(4, D)[truth_N] + 0.1 * normal(80, D)
    centroids_ED, cluster_N = balanced_kmeans(points_ND, 4, generator(), metric)
    assert cluster_N.bincount().tolist() == [20] * 4
    assert all(len(cluster_N[truth_N == i].unique()) == 1 for i in range(4))
    if metric == "cosine":
        torch.testing.assert_close(centroids_ED.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("points", [torch.zeros(12, 3), normal(4, 3).repeat(3, 1)], ids=["all equal", "repeated"])
def test_kmeans_takes_points_that_coincide(points):
    centroids_ED, cluster_N = balanced_kmeans(points, 6, generator())
    assert cluster_N.bincount(minlength=6).tolist() == [2] * 6
    assert torch.isfinite(centroids_ED).all()


def test_the_kmeans_routers_bias_makes_it_the_nearest_centroid():
    sample = sample_of()
    partition = PARTITIONS["contiguous"](sample, Parts(8, 0, 2), generator())
    router = ROUTERS["kmeans"](sample, partition, 2, generator())
    logits_TE = sample.x_TD @ router.weight_ED.T + router.bias_E
    nearest_T = torch.cdist(sample.x_TD, router.weight_ED).argmin(1)
    assert torch.equal(logits_TE.argmax(1), nearest_T)
    centroids_ED, _ = token_clusters(sample.x_TD, 8, generator())
    assert {tuple(c.tolist()) for c in centroids_ED} == {tuple(c.tolist()) for c in router.weight_ED}


def test_marker_distances_are_l1():
    markers_FT, centroids_ET = (normal(5, 9) > 0).float(), torch.rand(3, 9, generator=generator())
    expected = (markers_FT[:, None] - centroids_ET).abs().sum(-1)
    torch.testing.assert_close(marker_distances(markers_FT, centroids_ET), expected)


def test_ridge_without_regularisation_finds_a_linear_map():
    x_TD, weight_ED, bias_E = normal(50, D), normal(3, D, seed=1), normal(3, seed=2)
    found = RidgeProblem(x_TD).fit(x_TD @ weight_ED.T + bias_E, 0.0)
    torch.testing.assert_close(found.weight_ED, weight_ED, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias_E, bias_E, rtol=1e-4, atol=1e-4)


def test_ridge_is_its_normal_equation():
    x_TD, y_TE = normal(20, 5), normal(20, 2, seed=1)
    found = RidgeProblem(x_TD).fit(y_TE, 0.3)
    centred_TD = (x_TD - x_TD.mean(0)).double()
    moments_DD = centred_TD.T @ centred_TD
    alpha = 0.3 * moments_DD.trace() / 5
    expected = torch.linalg.solve(moments_DD + alpha * torch.eye(5), centred_TD.T @ (y_TE - y_TE.mean(0)).double()).T
    torch.testing.assert_close(found.weight_ED, expected.float())
    torch.testing.assert_close(found(x_TD.mean(0)), y_TE.mean(0))


@pytest.mark.parametrize("gated", [True, False])
def test_expert_outputs_sum_up_to_the_routed_part(gated):
    sample = sample_of(gated)
    partition = PARTITIONS["random"](sample, Parts(8, 2, 4), generator())
    outputs_TED = expert_outputs(sample, partition)
    torch.testing.assert_close(outputs_TED.norm(dim=2), expert_norms(sample, partition))
    shared_TD = output(sample.ffn, sample.h_TF * torch.isin(torch.arange(F), partition.shared_n))
    # fp32, another order of summation
    torch.testing.assert_close(shared_TD + outputs_TED.sum(1), dense_output(sample), rtol=1e-5, atol=1e-4)


def test_a_neuron_in_two_chosen_experts_counts_twice():
    sample = sample_of()
    ids_f = torch.arange(6)
    partition = Partition(torch.tensor([], dtype=torch.int64), torch.stack([ids_f, ids_f]))
    both_TK = torch.tensor([[0, 1]]).expand(T, 2)
    twice_TD = 2 * sample.h_TF[:, :6] @ sample.ffn.down_DF[:, :6].T
    torch.testing.assert_close(reconstruct(sample, partition, both_TK), twice_TD)


def oracle_errors(ids_TK: torch.Tensor, sample, partition) -> torch.Tensor:
    return (dense_output(sample) - reconstruct(sample, partition, ids_TK)).square().sum(1)


def test_the_oracle_is_no_worse_than_the_largest_outputs_and_near_the_best_choice_of_all():
    sample, K = sample_of(), 3
    partition = PARTITIONS["random"](sample, Parts(8, 2, 5), generator())
    choices = [torch.tensor(c).expand(T, K) for c in combinations(range(6), K)]
    optimum_T = torch.stack([oracle_errors(c, sample, partition) for c in choices]).amin(0)
    largest_T, best_T = (oracle_errors(way(sample, partition, K), sample, partition) for way in (largest, best))
    assert (best_T <= largest_T * 1.001 + 1e-3).all()
    assert best_T.sum() < 1.1 * optimum_T.sum()
    assert best_T.sum() < largest_T.sum()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_static_keeps_the_most_important_and_flap_adds_the_mean_of_the_rest(importance):
    sample = sample_of()
    kept, pruned = static(sample, 24, importance), flap(sample, 24, importance)
    score_F = IMPORTANCES[importance](sample)
    assert score_F.shape == (F,)
    is_kept_F = torch.isin(torch.arange(F), kept.neurons_n)
    assert score_F[is_kept_F].min() >= score_F[~is_kept_F].max()
    assert torch.equal(kept.neurons_n, pruned.neurons_n)
    # The compensated output has the dense mean. fp32, another order of summation.
    torch.testing.assert_close(kept_output(sample, pruned).mean(0), dense_output(sample).mean(0), rtol=1e-4, atol=1e-4)
    reference_TD = dense_output(sample)
    assert relative_error(reference_TD, kept_output(sample, pruned)) < relative_error(
        reference_TD, kept_output(sample, kept)
    )


def test_an_unknown_importance_is_refused():
    with pytest.raises(UserError, match="fluctuation"):
        static(sample_of(), 8, "fluctuations")


def test_alignment_gives_each_channel_the_reference_mean_and_variance():
    reference_TD, y_TD = 3 * normal(T, D) + 1, 0.5 * normal(T, D, seed=1)
    y_TD[:, 0] = 2.0  # a channel that does not vary
    scale_D, bias_D = alignment(reference_TD, y_TD)
    aligned_TD = y_TD * scale_D + bias_D
    torch.testing.assert_close(aligned_TD.mean(0), reference_TD.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(aligned_TD.var(0)[1:], reference_TD.var(0)[1:], rtol=1e-4, atol=1e-4)
    assert scale_D[0] == 1


def test_the_residual_bias_removes_the_mean_error():
    reference_TD, y_TD = normal(T, D), normal(T, D, seed=1)
    compensated_TD = y_TD + residual_bias(reference_TD, y_TD)
    torch.testing.assert_close(compensated_TD.mean(0), reference_TD.mean(0))


def test_refitted_kept_neurons_take_over_what_they_can_predict():
    """Every second neuron is off and is a multiple of its neighbour, so that nothing need be lost."""
    sample = sample_of()
    h_TF = sample.h_TF.clone()
    h_TF[:, 1::2] = 3 * h_TF[:, ::2] + 1
    sample = sample._replace(h_TF=h_TF)
    masked_TF = h_TF * (torch.arange(F) % 2 == 0)
    refit = refit_down(sample, masked_TF)
    reference_TD = dense_output(sample)
    assert relative_error(reference_TD, output(sample.ffn, masked_TF)) > 0.5
    assert relative_error(reference_TD, masked_TF @ refit.down_DF.T + refit.bias_D) < 0.05


def test_a_refit_leaves_neurons_alone_that_are_never_on():
    sample = sample_of(gated=False)
    masked_TF = sample.h_TF * (torch.arange(F) < 24)
    refit = refit_down(sample, masked_TF)
    assert torch.equal(refit.down_DF[:, 24:], sample.ffn.down_DF[:, 24:])
    found_TD = masked_TF @ refit.down_DF.T + refit.bias_D + sample.ffn.down_bias_D
    before = relative_error(dense_output(sample), output(sample.ffn, masked_TF))
    assert relative_error(dense_output(sample), found_TD) < before


def test_gradient_mass_is_the_first_order_change_of_the_loss():
    """Turning a neuron a little down changes the loss by -h dL/dh times the little."""
    sample = sample_of()
    mass_TF = gradient_mass(sample, "this test")
    assert sample.dh_TF is not None
    torch.testing.assert_close(mass_TF, (sample.h_TF * sample.dh_TF).abs())


def test_max_split_fills_experts_from_the_highest_pair_down():
    from lamella.conversion.partition.gradient import _greedy

    importance_EN = torch.tensor([[9.0, 8.0, 7.0, 1.0], [1.0, 6.0, 5.0, 0.5]])
    # 9 -> expert 0, 8 -> expert 0 (full), then 5 and 0.5 are left to expert 1
    assert _greedy(importance_EN, 2).tolist() == [0, 0, 1, 1]


def test_the_residual_expert_takes_what_most_clusters_list():
    from lamella.conversion.partition.gradient import _residual

    importance_EF = torch.tensor([[9.0, 8.0, 0.0, 1.0, 0.1, 0.0], [0.0, 7.0, 6.0, 1.0, 0.2, 0.0]])
    # Lists of two: {0, 1} and {1, 2}: neuron 1 twice, then 0 by index; then {2, 3}... without the taken ones.
    assert _residual(importance_EF, 2, 2).tolist() == [0, 1]
    assert _residual(importance_EF, 4, 2).tolist() == [0, 1, 2, 3]
    assert _residual(importance_EF, 0, 2).tolist() == []


def test_the_search_finds_the_count_with_the_least_heldout_error():
    sample = sample_of()
    chosen, errors = search_shared(sample, 8, 4, PARTITIONS["coadapted"], ROUTERS["ridge"], generator())
    assert list(errors) == [0, 1, 2, 3]
    assert errors[chosen] == min(errors.values())
    again, _ = search_shared(sample, 8, 4, PARTITIONS["coadapted"], ROUTERS["ridge"], generator(), [chosen])
    assert again == chosen


def test_the_search_needs_tokens_to_hold_out():
    sample = sample_of()
    with pytest.raises(UserError, match="calibrat"):
        split_tokens(sample._replace(x_TD=sample.x_TD[:1], h_TF=sample.h_TF[:1], dh_TF=None))
