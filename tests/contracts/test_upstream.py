"""What we lean on in transformers, TRL, PEFT and datasets beyond their documented surface.

A test here that fails after an upgrade says which room has to change, or that a way round is no longer needed.
"""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

from ernie_align.models.checkpoint_files import CheckpointFiles


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO"])
def test_the_keys_read_from_the_source_are_those_of_trls_config(name):
    """stages.trl_keys reads them without importing TRL."""
    import trl

    from ernie_align.stages import trl_keys

    real = {field.name for field in dataclasses.fields(getattr(trl, f"{name}Config")) if field.init}
    told = set(trl_keys.training_model(getattr(trl_keys, f"{name}_CONFIG")).model_fields)
    assert told <= real | {"local_rank"} and real - told <= set(), real ^ told


def test_every_key_that_is_set_elsewhere_is_a_key():
    from ernie_align.stages import STAGES
    from ernie_align.stages.trl_keys import DPO_CONFIG, GRPO_CONFIG, KTO_CONFIG, SFT_CONFIG, training_model

    configs = (SFT_CONFIG, DPO_CONFIG, KTO_CONFIG, GRPO_CONFIG)
    keys = {key for config in configs for key in training_model(config).model_fields}
    for stage in STAGES.values():
        assert set(stage.recipe.reserved_training_keys()) <= keys


def test_private_methods_that_are_overridden_or_called():
    """stages.trainer overrides two, data.render calls one."""
    from transformers import Trainer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend
    from trl import SFTTrainer

    assert list(inspect.signature(Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    assert "_get_grad_norm" in inspect.getsource(Trainer._run_epoch)
    assert "on_pre_optimizer_step" in inspect.getsource(Trainer._run_epoch).split("_get_grad_norm")[1]
    assert "_send_telemetry" in inspect.getsource(SFTTrainer.__mro__[1].__init__)
    assert "model_accepts_loss_kwargs" in inspect.getsource(Trainer._get_num_items_in_batch)
    assert list(inspect.signature(TokenizersBackend._get_control_tokens).parameters) == ["self", "chat_template"]
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert '_metrics[mode]["mean_token_accuracy"].append' in source


def test_the_parts_of_trl_that_the_upo_trainer_overrides_or_calls():
    """stages.upo.trainer sits between TRL's generation and TRL's policy loss."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head, use_adapter

    def parameters(function):
        return list(inspect.signature(function).parameters)

    generation = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"]
    assert parameters(GRPOTrainer._generate_single_turn) == generation
    assert parameters(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    forward = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert forward[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"pixel_values", "image_grid_thw", "num_images"} <= set(forward)
    assert parameters(use_adapter) == ["model", "adapter_name"]  # called by AlignmentTrainer
    assert {"temperature", "cast_lm_head_to_fp32"} <= set(parameters(add_fused_lm_head))
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    for name in ("self.beta", "current_gradient_accumulation_steps", 'inputs["num_items_in_batch"]'):
        assert name in loss  # they scale its terms, and so ours
    assert 'inputs.get("old_per_token_logps")' in loss and 'inputs["ref_per_token_logps"]' in loss
    when = "gradient_accumulation_steps % generate_every != 0"  # when the policy changes within a rollout
    assert when in inspect.getsource(GRPOTrainer._generate_and_score_completions)
    generate = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "generation_config=self.generation_config" in generate and "self.generation_kwargs" in generate
    assert "self.eos_token_ids" in generate
    assert "_step" in inspect.getsource(GRPOTrainer.training_step)
    # defaults that validate a recipe without importing TRL
    from ernie_align.stages.upo.recipe import _DEFAULTS

    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for key, value in _DEFAULTS.items():
        assert getattr(fields[key], "value", fields[key]) == value, key


def test_what_the_preference_trainer_overrides_or_calls():
    """stages.dpo_trainer gives TRL finished log-probabilities and takes its losses and metrics."""
    from transformers import Trainer
    from trl import DPOTrainer

    assert list(inspect.signature(DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]
    source = inspect.getsource(DPOTrainer._compute_loss)
    for used in ("if self.precompute_ref_logps:", 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]'):
        assert used in source
    assert source.count("model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1
    read = {"log_probs", "aux_loss", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"}
    assert set(re.findall(r"(?<!ref_)outputs\.(\w+)", source)) == read
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    constructor = inspect.getsource(DPOTrainer.__init__)
    assert 'model.add_adapter("ref", default_config)' in constructor
    assert "self._prepare_dataset(train_dataset" in constructor and "self._precompute_ref_logps(" in constructor
    assert list(inspect.signature(Trainer._save).parameters) == ["self", "output_dir", "state_dict"]


def test_what_the_kto_trainer_overrides_or_calls():
    """stages.kto_trainer gives TRL finished log-probabilities; when TRL stops fixing the order of rows, it need not
    shuffle by itself."""
    from trl import KTOTrainer

    assert list(inspect.signature(KTOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]
    assert list(inspect.signature(KTOTrainer._compute_kl_logps).parameters) == ["self", "model", "batch"]
    assert list(inspect.signature(KTOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    loss = inspect.getsource(KTOTrainer._compute_loss)
    for used in ('batch["ref_logps"]', 'batch["ref_KL_logps"]', "KL_logps = self._compute_kl_logps(model, batch)"):
        assert used in loss
    assert loss.index("if self.precompute_ref_logps:") < loss.index("self.ref_model(")
    assert "gather_for_metrics(kl)" in loss  # the KL term is a mean over all ranks
    reference = inspect.getsource(KTOTrainer.compute_ref_log_probs)
    assert reference.count("input_ids=") == reference.count("fused_lm_head=True") == 2
    assert 'args.train_sampling_strategy != "sequential"' in inspect.getsource(KTOTrainer.__init__)


def test_what_shared_prompts_and_images_once_lean_on():
    """models.shared_prompt and models.vision_once reach transformers and TRL's head through arguments and hooks."""
    from transformers import masking_utils
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel
    from trl import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    assert "mm_encoder_outputs" in inspect.signature(Ernie4_5_VLMoeModel.forward).parameters
    assert 'mm_encoder_outputs["image"].pooler_output' in inspect.getsource(Ernie4_5_VLMoeModel.forward)
    features = inspect.getsource(Ernie4_5_VLMoeModel.get_image_features)  # what generate calls, before the backbone
    assert "self.vision_tower(pixel_values, image_grid_thw, **kwargs)" in features
    assert "self.resampler_model(image_outputs.last_hidden_state, image_grid_thw)" in features
    asked = {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"}
    assert asked <= set(inspect.signature(Ernie4_5_VLMoeModel.get_rope_index).parameters)
    assert "len(attention_mask.shape) == 4" in inspect.getsource(masking_utils)  # such a mask is taken as it is
    head = inspect.getsource(add_fused_lm_head)
    assert "getattr(self, backbone_attr)(*args, **kwargs)" in head and "labels = shift_labels" in head
    reference = inspect.getsource(DPOTrainer.compute_ref_log_probs)
    assert "model(**model_kwargs, labels=labels, fused_lm_head=True).log_probs" in reference


def test_checkpointing_still_sends_gradients_through_a_frozen_tower(checkpoints):
    """models.vision_once computes its features without gradient; when this fails it need not."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checkpoints["vl_moe"]).requires_grad_(False)
    model.enable_input_require_grads()
    pixels, grid = torch.zeros(16, 588), torch.tensor([[1, 4, 4]])
    assert model.model.get_image_features(pixels, grid).pooler_output[0].requires_grad


def test_where_trainer_writes_checkpoints_and_whom_it_tells():
    """Every trainer of ours writes beside (models.seal); runs.keep names what is whole; runs.stopping saves itself."""
    from transformers import Trainer

    from ernie_align.stages.trainer import AlignmentTrainer

    assert list(inspect.signature(Trainer._get_output_dir).parameters) == ["self", "trial"]
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert "run_dir = self._get_output_dir(trial=trial)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self.callback_handler.on_save(" in inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "_get_output_dir" in vars(AlignmentTrainer)
    log = inspect.getsource(Trainer.log)  # as many lines of metrics.jsonl as Trainer remembers
    assert log.index("self.state.log_history.append(output)") < log.index("self.callback_handler.on_log(")


def test_trainer_still_takes_a_step_beyond_the_last():
    """runs.stopping leaves before it, and runs.train ends the run; when this fails neither is needed."""
    from transformers import Trainer

    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.index("self.training_step(") < epoch.index("self.control.should_training_stop")
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self._initial_global_step =") < loop.index("self.callback_handler.on_train_begin(")
    assert loop.index("self.callback_handler.on_train_begin(") < loop.index("self._run_epoch(")
    assert list(inspect.signature(Trainer._finalize_training).parameters)[1:] == [
        "trial", "num_train_samples", "start_time",
    ]  # fmt: skip


def test_trainer_still_resumes_an_adapter_from_its_subfolders_alone():
    """stages.trainer removes the reference's folder from checkpoints; when this fails it may stay."""
    from transformers import Trainer

    assert "if adapter_subdirs:" in inspect.getsource(Trainer._load_from_checkpoint)


def test_trl_knows_the_loss_types_of_the_recipe():
    from typing import get_args

    from trl import DPOTrainer

    from ernie_align.stages.dpo import _EXTRA_LOSSES, LossType

    known = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))
    assert set(get_args(LossType)) == {*known, *_EXTRA_LOSSES}


def test_transformers_still_lets_documents_see_one_another(checkpoints):
    """models.documents derives positions at the backbone and keeps caches away; when this fails it need not."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checkpoints["vl_moe"])
    ids, positions = torch.arange(300, 340)[None], torch.arange(20).repeat(2)[None]
    with torch.no_grad():
        alone = model(input_ids=ids[:, 20:]).logits
        for leaking in ({"position_ids": positions, "use_cache": False}, {"position_ids": positions.expand(4, 1, -1)}):
            assert (model(input_ids=ids, **leaking).logits[:, 20:] - alone).abs().max() > 1e-2


def test_what_packed_documents_lean_on():
    """models.documents registers an attention and its mask, and hands bounds down through every keyword argument."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel
    from trl import SFTTrainer

    assert AttentionInterface.register and AttentionMaskInterface.register
    masks = inspect.getsource(masking_utils.create_causal_mask)
    assert "q_length=q_length" in masks and "mask_function=mask_factory_function" in masks
    assert "position_diff != 1" in inspect.getsource(masking_utils.find_packed_sequence_indices)
    assert list(inspect.signature(sdpa_attention_forward).parameters)[:5] == [
        *("module", "query", "key", "value", "attention_mask"),
    ]
    known = list(inspect.signature(Ernie4_5_VLMoeModel.get_rope_index).parameters)
    assert known[1:3] == ["input_ids", "mm_token_type_ids"] and {"image_grid_thw", "attention_mask"} <= set(known)
    # tokens of a batch without a mask; and why packing is not left to TRL: it brings its own collator, without images
    assert 'inputs["position_ids"].size(1)' in inspect.getsource(SFTTrainer.compute_loss)
    assert "a custom data collator is not supported when using padding-free" in inspect.getsource(SFTTrainer.__init__)


def test_data_is_fetched_between_the_steps():
    """runs.clock measures the wait from there."""
    from transformers import Trainer

    source = inspect.getsource(Trainer._run_epoch)
    places = [source.index(f"{name}(") for name in ("get_batch_samples", "on_step_begin", "on_step_end")]
    assert places == sorted(places) and source.index("_maybe_log_save_evaluate(") > places[-1]


def test_trl_takes_a_column_named_images_for_its_own():
    """data.render calls the column `media`; when this fails it may have its natural name."""
    from trl import SFTTrainer

    assert '"images" in dataset_sample' in inspect.getsource(SFTTrainer.__init__)


def test_the_vl_class_still_declines_loss_kwargs():
    """stages.sft_trainer sets model_accepts_loss_kwargs; when this fails it need not."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    assert Ernie4_5_VLMoeForConditionalGeneration.accepts_loss_kwargs is False


def test_correction_biases_still_come_back_trainable(checkpoints):
    """models.load freezes them; when this fails it need not."""
    from transformers import Ernie4_5_MoeForCausalLM

    built = Ernie4_5_MoeForCausalLM.from_pretrained(checkpoints["moe"])
    biases = [p for name, p in built.named_parameters() if name.endswith("e_score_correction_bias")]
    assert biases and all(bias.requires_grad for bias in biases)


def test_peft_still_keeps_targets_in_a_set():
    """models.experts.names_in_order puts them in order, so that they are written alike by every process of Python."""
    from peft import LoraConfig

    assert isinstance(LoraConfig(target_modules=["q_proj", "k_proj"]).target_modules, set)


def test_peft_still_rewrites_the_targets_of_the_text_family(checkpoints):
    """models.adapters names the dense and shared MLPs as parameters; when this fails it may name modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import Ernie4_5_MoeForCausalLM

    base = Ernie4_5_MoeForCausalLM.from_pretrained(checkpoints["moe"])
    names = [f"model.layers.1.mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names))
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted and not any("shared_experts" in name for name in adapted)


def test_transformers_still_misroutes_a_batch_without_the_tensor(checkpoints):
    """models.modality derives it; when this fails the backbone does so itself."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    from ernie_align.models.routing_stats import count_routed_tokens, find_expert_pools

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checkpoints["vl_moe"])
    ids = torch.tensor([[3, model.config.image_start_token_id, model.config.image_end_token_id, 5]])
    with count_routed_tokens(find_expert_pools(model)) as seen, torch.no_grad():
        model(input_ids=ids)
    assert set(seen.vision.values()) == {0}


def test_the_stock_processor_still_returns_the_routing_tensor():
    """models.processor leaves it out; when this fails the stock one may be used."""
    from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor

    assert "moe_mm_token_type_ids" in inspect.getsource(Ernie4_5_VLMoeProcessor.__call__)


def test_trainer_still_restores_a_full_model_in_part(checkpoints, text_rows, tmp_path):
    """runs.train builds the model from the checkpoint; when this fails Trainer may be trusted with it."""
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(checkpoints["vl_moe"])
    from safetensors.torch import load_file

    saved = load_file(checkpoints["vl_moe"] / "model.safetensors")
    result = model.load_state_dict(saved, strict=False)
    assert len(result.missing_keys) > 10


def test_sanitized_encoding_is_plain_encoding_where_nothing_is_marked(checkpoints):
    """data.render sends every text through it."""
    tokenizer = CheckpointFiles(str(checkpoints["vl_moe"])).tokenizer()
    text = "<|begin_of_sentence|>User: Which digit? é\nAssistant: "
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"] == plain


def test_the_tokenizer_class_is_the_one_transformers_chooses(checkpoints, family):
    """models.files loads it directly, which takes no torch."""
    from transformers import AutoTokenizer

    ours = CheckpointFiles(str(checkpoints[family])).tokenizer()
    theirs = AutoTokenizer.from_pretrained(checkpoints[family])
    assert type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()


def test_the_defaults_in_the_anatomy_are_the_classes():
    """For keys that a config.json leaves out."""
    import transformers

    from ernie_align.models import architecture

    text = transformers.Ernie4_5_VLMoeConfig().text_config
    moe, dense = transformers.Ernie4_5_MoeConfig(), transformers.Ernie4_5Config()
    vision = transformers.Ernie4_5_VLMoeConfig().vision_config
    for name, value in architecture._TEXT_DEFAULTS.items():
        assert value in {getattr(text, name, value), getattr(moe, name)}
    assert all(getattr(dense, name) == value for name, value in architecture._DENSE_DEFAULTS.items())
    assert all(getattr(vision, name) == value for name, value in architecture._VISION_DEFAULTS.items())


@pytest.mark.parametrize("name", ["save_total_limit", "save_strategy", "save_steps", "dataset_num_proc"])
def test_training_keys_that_we_read_ourselves_exist(name):
    from trl import SFTConfig

    assert name in {field.name for field in dataclasses.fields(SFTConfig)}


def test_the_door_that_expert_adapters_go_through():
    """models.experts registers a subclass of PEFT's wrapper and reads its factors as PEFT lays them out."""
    from peft import LoraConfig
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTuner

    from ernie_align.models.expert_lora import ParamWrapper

    config = LoraConfig()
    config._register_custom_module({torch.nn.Module: ParamWrapper})
    assert config._custom_modules == {torch.nn.Module: ParamWrapper} and "_custom_modules" not in config.to_dict()
    assert '__class__.__name__ == "ParamWrapper"' in inspect.getsource(BaseTuner._inject_parameters)
    assert ParamWrapper.__name__ == lora.ParamWrapper.__name__
    assert list(inspect.signature(lora.ParamWrapper._check_forward_args).parameters)[:2] == ["self", "x"]
    layout = inspect.getsource(lora.ParamWrapper.get_delta_factors)
    assert "weight_A.reshape(self.num_experts, -1, weight_A.shape[-1])" in layout
    assert "weight_B.reshape(weight_B.shape[0], -1, self.num_experts)" in layout


def test_peft_still_builds_the_whole_update_of_experts():
    """models.experts does not; when this fails PEFT's own wrapper may be fast, and ours may go."""
    from peft.tuners import lora

    assert "register_parametrization" in inspect.getsource(lora.ParamWrapper._activate_lora)


def test_the_experts_of_both_families_are_what_grouped_products_take(checkpoints):
    """models.grouped repeats transformers' grouped_mm kernel for gated experts without biases, stored (E, out, in)."""
    from transformers import Ernie4_5_MoeForCausalLM
    from transformers.integrations.moe import grouped_mm_experts_forward

    model = Ernie4_5_MoeForCausalLM.from_pretrained(checkpoints["moe"])
    experts = model.model.layers[1].mlp.experts
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.has_post_expert_norm) == (True,) + 3 * (
        False,
    )
    assert experts.config._experts_implementation == "grouped_mm" and experts._is_expert_parallel is False
    gate_up = torch.randn(3, 2 * experts.intermediate_dim)
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(experts._apply_gate(gate_up), torch.nn.functional.silu(gate) * up)
    assert "self._apply_gate(proj_out)" in inspect.getsource(grouped_mm_experts_forward)


def test_experts_can_be_dealt_out_before_the_rest_is_spread():
    """models.parallel puts adapters on between the two: told of one batch, transformers leaves FSDP2 out, and what does
    FSDP2 asks for nothing else than the meshes and the two plans."""
    from transformers import PreTrainedModel
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

    source = inspect.getsource(PreTrainedModel.maybe_distribute_model)
    spread = "if distributed_config.dp_size > 1:\n            model = apply_fully_sharded_data_parallelism("
    assert source.count(".dp_size") == 1 and spread in source
    assert "model._mesh_manager = mesh_manager" in source
    assert "fsdp_plan = dict(self.fsdp_plan) if distributed_config.dp_size > 1 else {}" in inspect.getsource(
        PreTrainedModel._resolve_parallel_plans
    )
    taken = list(inspect.signature(apply_fully_sharded_data_parallelism).parameters)
    assert taken == ["model", "mesh_manager", "fsdp_plan", "ep_plan"]


def test_the_language_model_passes_the_routing_tensor_on_untouched():
    """models.dispatch hands rows down in its place; tests/model/test_token_dispatch.py proves that they arrive."""
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as module

    source = inspect.getsource(module.Ernie4_5_VLMoeTextModel.forward)
    assert source.count("moe_mm_token_type_ids=moe_mm_token_type_ids,") == 1
    assert "self.mlp(hidden_states, moe_mm_token_type_ids)" in inspect.getsource(module.Ernie4_5_VLMoeDecoderLayer)


def test_the_stock_block_still_masks_element_by_element():
    """models.dispatch chooses rows once; when this fails the stock block may do so itself."""
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock

    assert "hidden_states[~token_type_ids_states]" in inspect.getsource(Ernie4_5_VLMoeMoeBlock.forward)


def test_what_several_processes_lean_on():
    """stages.trainer overrides these of Trainer, and reads how Accelerate pads the last batches of an evaluation."""
    from accelerate.state import GradientState
    from transformers import Trainer

    def parameters(function):
        return list(inspect.signature(function).parameters)

    assert parameters(Trainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameters(Trainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert {"end_of_dataloader", "remainder"} <= {name for name, _ in inspect.getmembers(GradientState)}
    told = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "on_save" in told.split("_save_checkpoint")[1]  # by then every process has written its part


def test_the_backbone_takes_embeddings_beside_ids_and_images_seen_already():
    """models.touch hands both over: shards come in the order that they come in where an image is shown."""
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as module

    source = inspect.getsource(module.Ernie4_5_VLMoeModel.forward)
    embeds, sees = source.index("self.get_input_embeddings()(input_ids)"), source.index("self.get_image_features(")
    assert embeds < sees and 'mm_encoder_outputs["image"].pooler_output' in source


def test_accelerate_still_takes_fsdp_for_ddp_without_an_accelerator():
    """runs.distributed rejects it; tests/support/multi_process.py makes Accelerate believe in one."""
    from accelerate.state import AcceleratorState

    source = inspect.getsource(AcceleratorState.__init__)
    kinds = source.split("ACCELERATE_ALLOW_CP_STANDALONE")[0].rsplit("elif self.distributed_type in [", 1)[1]
    assert "MULTI_GPU" in kinds and "MULTI_CPU" not in kinds


def test_what_reading_by_the_first_process_leans_on():
    """models.first, of Accelerate: weights go to meta and come back from process 0's state dict, buffers stay, and the
    optimizer finds its weights by their addresses, which on meta are all 0 (AlignmentTrainer.create_optimizer)."""
    from accelerate import Accelerator
    from accelerate.utils import fsdp_utils
    from transformers import Trainer
    from transformers.distributed.fsdp import is_fsdp_enabled

    sharding = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    assert 'model = model.to(torch.device("meta"))' in sharding and "original_non_persistent_buffers" in sharding
    assert 'accelerator.mixed_precision != "no"' in sharding  # and then trained weights become float32
    assert "p.data_ptr()" in inspect.getsource(Accelerator._prepare_fsdp2)
    assert torch.empty(2, device="meta").data_ptr() == 0
    prepared = inspect.getsource(Trainer._prepare_for_training)
    assert prepared.index("self.create_optimizer()") < prepared.index("self.accelerator.prepare(self.model, self.opt")
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" in inspect.getsource(is_fsdp_enabled)
