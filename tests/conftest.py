import sys
import warnings

import pytest
import torch
from helpers import untouched
from helpers.nets import images, trainer
from helpers.strangers import Lit

from lightning_zipit import ZipIt
from lightning_zipit.graph import registry

untouched.install()

collect_ignore = ["helpers/ddp_script.py", "helpers/failing_script.py"]
"""Scripts that tests start as processes."""


NIGHTLY = (
    "ddp/test_launchers.py::test_torchrun_starts",
    "ddp/test_shares.py::test_processes_that_share_a_sweep",
    "graph/test_trace.py::test_a_segmentation_network",
    "refine/test_refine.py::test_a_model_merged_with_a_permuted_copy_stays_the_same_function[norm first",
    "refine/test_refine.py::test_a_model_merged_with_a_permuted_copy_stays_the_same_function[shuffled",
    "refine/test_refine.py::test_activations_beyond_cache_bytes_are_recomputed[0-None]",
    "refine/test_refine.py::test_activations_beyond_cache_bytes_are_recomputed[1048576",
    "refine/test_refine.py::test_pre_activations_are_matched_for_least_squares",
    "refine/test_refine.py::test_refinement_does_not_depend_on_the_split_into_batches[9]",
    *(
        f"refine/test_stops.py::test_a_layer_is_fitted_to_a_sum_of_its_own_shape[{name}]"
        for name in (
            *("a square", "add", "add_", "behind dropout", "mirrored", "of a parameter", "of a pooled value"),
            *("of a layer that is left", "of twice the same", "of what is computed between", "scaled by a number"),
            *("scaled by position", "torch.add", "with a factor, as a method", "with a number", "y + x"),
        )
    ),
    "refine/test_stops.py::test_layers_that_end_a_residual_branch_are_fitted_to_the_sum[",
    *(
        f"test_architectures.py::test_a_model_merged_with_a_permuted_copy_gives_the_same_function[{name}]"
        for name in (
            *("maxvit", "swin", "swin v2", "three dimensions", "densenet", "shufflenet", "squeezenet1_1", "regnet"),
            *("mobilenet_v2", "mobilenet_v3", "convnext", "efficientnet", "tokens, norm last"),
            "attention without fusing",
        )
    ),
    "test_cli.py::test_options_come_from_the_environment",
    "test_dense.py::test_a_network_and_its_copies_merge_to_what_they_compute[batch_norm",
    "test_dense.py::test_a_network_and_its_copies_merge_to_what_they_compute[repair",
    *(
        f"test_driver.py::test_compiled_models_merge_as_they_would_uncompiled[{part}]"
        for part in ("in place", "a part of it", "the model")
    ),
    "test_driver.py::test_more_than_two_models[4]",
    *(
        "test_driver.py::test_whatever_the_precision_the_matching_is_much_the_same_and_the_weights_keep_their_type"
        f"[{precision}]"
        for precision in ("16-true", "16-mixed", "64-true", "bf16-true")
    ),
    "test_failures.py::test_a_process_that_is_killed",
    *(
        f"test_failures.py::test_a_failure_while_calibrating_leaves_everything_as_it_was[{case}]"
        for case in ("0-Ctrl-C", "0-NaN", "47-shape", "47-type", "47-unreadable")
    ),
    "test_merging_again.py::test_with_all_the_weight",
    "test_readme.py::test_a_search",
    "test_readme.py::test_a_sweep",
    "test_readme.py::test_merging_again",
    "test_readme.py::test_serving",
    "test_readme.py::test_several_data_sets",
    "test_readme.py::test_stems",
    "test_readme.py::test_the_line_between_two_models",
    "test_stems.py::test_a_permuted_copy_behind_its_own_stem_merges_to_the_same_function[SmallResNet-layer1.0.conv2",
    "test_stems.py::test_a_permuted_copy_behind_its_own_stem_merges_to_the_same_function[UNet",
    "test_sweep.py::test_a_finished_sweep_gathers",
    "test_weight_matching.py::test_a_permuted_copy_is_found_by_its_weights[depthwise",
    "test_weight_matching.py::test_a_permuted_copy_is_found_by_its_weights[groups",
    "test_weight_matching.py::test_a_permuted_copy_is_found_by_its_weights[shuffled",
    "test_widths.py::test_a_sweep_over_ends_of_the_trunk",
    "test_widths.py::test_a_wider_merge_of_copies_is_the_network[Agglomerative(linkage='average')-",
    "test_widths.py::test_a_wider_merge_of_copies_is_the_network[KMeans(seed=0)-",
    "test_widths.py::test_the_more_may_be_spent",
    "graph/test_compare.py::test_dropout_of_attention_may_differ",
    "graph/test_draw.py::test_all_spaces_have_different_colours",
    "refine/test_refine.py::test_a_model_merged_with_a_permuted_copy_stays_the_same_function[residual-repair",
    "refine/test_refine.py::test_least_squares_is_closer_to_the_sources_than_zipping[norm first",
    "refine/test_refine.py::test_refinement_does_not_depend_on_the_split_into_batches",
    "test_architectures.py::test_a_model_merged_with_a_permuted_copy_gives_the_same_function[attention written out",
    "test_cli.py::test_a_merged_checkpoint_is_merged_with_another",
    "test_cli.py::test_plain_weights_are_loaded",
    "test_cli.py::test_required_arguments_of_the_model",
    "test_cli.py::test_tasks_keep_their_stems",
    "test_driver.py::test_a_merge_leaves_no_statistics_to_the_garbage_collector",
    "test_driver.py::test_compiled_models_merge",
    "test_driver.py::test_whatever_the_precision",
    "test_export.py::test_weights_beyond_what_onnx_holds",
    "test_merging_again.py::test_three_models_one_after_the_other",
    "test_readme.py::test_statistics_of_two_sites",
    "test_readme.py::test_the_table",
    "test_readme.py::test_widths[auto",
    "test_statistics.py::test_moments_of_two_processes_equal_those_of_one",
    "test_statistics_file.py::test_resuming_refuses_other_positions",
    "test_stems.py::test_a_sweep_tries_starts_too",
    "test_widths.py::test_a_budget_of_flops_is_kept_and_spent",
    *(
        "test_widths.py::test_a_wider_merge_of_copies_is_the_network[DualSpace(tau=0.5, "
        f"matcher=GreedyZip(alpha=0.1, beta=1.0), rounds=20, seed=0)-{refine}]"
        for refine in ("batch_norm", "repair")
    ),
    "refine/test_fits.py::test_fitted_layer_equals_dense_least_squares[circular-False",
    "refine/test_refine.py::test_least_squares_is_closer_to_the_sources_than_zipping[residual",
    "refine/test_task_norms.py::test_module_with_per_task_norms_is_saved",
    "test_architectures.py::test_a_model_merged_with_a_permuted_copy_gives_the_same_function[tokens]",
    "test_cli.py::test_a_merged_checkpoint_runs_in_place_of_the_model[predict]",
    "test_cli.py::test_a_merged_checkpoint_runs_in_place_of_the_model[validate]",
    "test_cli.py::test_hyperparameters_that_are_objects_are_made_again",
    "test_cli.py::test_settings_of_a_sweep_are_given_as_flags",
    "test_merging_again.py::test_layers_are_fitted_to_modules_that_were_merged_before",
    "test_readme.py::test_calibrating_once",
    "test_readme.py::test_plots",
    "test_readme.py::test_the_joint_accuracy",
    "test_statistics_file.py::test_adding_statistics_refuses_other_networks",
    "test_statistics_file.py::test_statistics_file_refuses_other_positions",
    "test_statistics_file.py::test_statistics_for_several_cuts",
    "test_statistics_file.py::test_statistics_without_proof",
    "test_sweep.py::test_shares_of_a_sweep",
    "test_widths.py::test_with_nothing_merged_every_head_is_its_own_source[dense-2",
    "test_widths.py::test_with_nothing_merged_every_head_is_its_own_source[resnet-3",
)
"""What takes long, and has a shorter test of its kind beside it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in NIGHTLY):
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(autouse=True)
def _quiet_and_repeatable(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("MPLBACKEND", "agg")
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _rules_stay_as_they_are(monkeypatch):
    """A test that registers a rule registers it for itself only."""
    monkeypatch.setattr(registry, "OPERATORS", dict(registry.OPERATORS))


@pytest.fixture(autouse=True)
def _sources_stay_as_they_are(request):
    """Every call of a public function asserts it; a test that changes its sources itself says so by a marker."""
    if request.node.get_closest_marker("changes_sources"):
        with untouched.guard.suspended():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def handed_over(tmp_path_factory):
    """The content of a merged checkpoint, and of a trained one."""
    folder = tmp_path_factory.mktemp("trusted")
    run = trainer()
    sources = {"a": Lit(), "b": Lit()}
    ZipIt(run).merge(sources, images(count=16, size=8), backbone="net", refine=None, verify=False)
    run.save_checkpoint(folder / "merged.ckpt")
    run.strategy.connect(sources["a"])
    run.save_checkpoint(folder / "trained.ckpt")
    return {name: (folder / f"{name}.ckpt").read_bytes() for name in ("merged", "trained")}


@pytest.fixture
def inbox(handed_over, tmp_path, monkeypatch):
    """The working folder, with a checkpoint of each kind and a module that nobody has imported."""
    for name, content in handed_over.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    (tmp_path / "payload.py").write_text(
        "open('marker', 'w')\nfrom helpers.strangers import Lit\nclass Net(Lit): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["main.py"])
    yield tmp_path
    sys.modules.pop("payload", None)
