"""Options of other trainers without one of ours in their place, and why: it is so here anyway, or there is no such."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.foreign.values import number, truth, words
from train.not_offered import reason_for


@dataclass(frozen=True)
class Reason:
    """Why an option has no counterpart; `is_so_anyway`: nothing is lost by leaving it out."""

    text: str
    is_so_anyway: bool
    is_told_when_off: bool = False  # what is off there is not so here


def _always(value: Any) -> bool:
    return True


def _is(*wanted: object) -> Callable[[Any], bool]:
    """Whether the value is one of these, as a number or as text, in any case and behind the name of an enum."""
    texts, amounts = {str(each).lower() for each in wanted}, {number(each) for each in wanted} - {None}

    def is_so(value: Any) -> bool:
        amount = None if isinstance(value, bool) else number(value)
        return str(value).lower().rpartition(".")[2] in texts if amount is None else amount in amounts

    return is_so


def _only(*wanted: str) -> Callable[[Any], bool]:
    """Whether each entry of a list, or of text with commas between them, is one of these."""

    def is_so(value: Any) -> bool:
        found = words(value)
        return bool(found) and {word.lower() for word in found or ()} <= set(wanted)

    return is_so


def _off(value: Any) -> bool:
    return truth(value) is False or value in ([], {})


def _is_causal(value: Any) -> bool:
    """Whether a model's class is that of a causal language model, or names no head at all."""
    return not re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", str(value))


def _is_even(value: Any) -> bool:
    """Whether accelerate's settings leave a batch to each process, as they do by default."""
    return not isinstance(value, dict) or not truth(value.get("split_batches"))


def _has_kernels_alone(value: Any) -> bool:
    """Whether all plugins of axolotl are for kernels, which change nothing that is trained."""
    found = words(value) or ("",)
    return all(re.search("liger|cut_?cross_?entropy", str(plugin).lower()) for plugin in found)


ADAM = "AdamW has betas 0.9 and 0.999 and epsilon 1e-8"
# a pattern of names -> for which values it is so here anyway, and what to say of these and of all others
ANYWAY: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    (r"attn_implementation|flash_attn|use_flash_attention(_2)?|(flash|sdp|xformers|flex|eager)_attention|flash_attn_.+",
     _always, "attention is what the GPU and the model allow; the banner names what replaces a kernel", ""),
    (r"s2_attention|shift_attn", _off, "each token sees all before it", "each token sees all before it in its sample"),
    (r"packing_strategy", _is("bfd", "none"), "rows are filled best fit first, and no sample is cut",
     "rows are filled best fit first, and no sample is cut (data.truncation split makes several of a long one)"),
    (r"project|trackio_.+|hub_private_repo", _always, "Trackio is not offered; --track.project is W&B's", ""),
    (r"padding_free|pad_to_sequence_len|pad_to_multiple_of|batch_flattening|dataset_num_proc|dataset_processes",
     _always, "nothing is padded on the fused engine, and all cores prepare the data", ""),
    (r"(use|enable)_liger_kernel|liger_.+|lora_(mlp|qkv|o)_kernel|unsloth_.+|use_unsloth(_gc)?|cut_cross_.+",
     _always, "the fused engine has kernels of its own, and the reference engine takes Liger's (--engine.liger)",
     ""),
    (r"plugins", _has_kernels_alone, "the fused engine has kernels of its own, and the reference engine takes Liger's "
     "(--engine.liger)", "plugins are not loaded: no code but our own decides what is trained"),
    (r"(completion|assistant)_only_loss", _is("true", "none"), "the assistant's turns alone are trained, each whole",
     "here prompts are never trained; rows of text are trained whole"),
    (r"train_on_(inputs|prompt|source)", _off, "the assistant's turns alone are trained, each whole",
     "here prompts are never trained; rows of text are trained whole"),
    (r"roles_to_train", _only("assistant", "gpt"), "the assistant's turns alone are trained",
     "the assistant's turns alone are trained; `train: false` in a turn leaves one out"),
    (r"train_on_eos|train_on_eot", _is("turn"), "each answer's end token is trained",
     "here each trained answer's end token is trained, and no prompt's"),
    (r"loss_type", _is("nll", "chunked_nll"), "the loss is cross entropy over trained tokens, in chunks",
     "there is cross entropy alone"),
    (r"bnb_4bit_quant_type|quantization_type", _is("nf4"), "4 bits are NF4 by bitsandbytes",
     "4 bits are NF4 by bitsandbytes, nothing else"),
    (r"quantization_method", _is("bnb", "bitsandbytes"), "4 bits are NF4 by bitsandbytes",
     "4 bits are NF4 by bitsandbytes, nothing else"),
    (r"use_bnb_nested_quant|bnb_4bit_use_double_quant|double_quantization", _is("true"),
     "NF4 is doubly quantised", "NF4 is always doubly quantised, which takes 0.4 bits a weight less"),
    (r"do_(train|eval)", _always, "this trains on prompts and answers, and validates on what is held out", ""),
    (r"stage", _is("sft"), "this trains on prompts and answers, and validates on what is held out",
     "supervised fine-tuning alone; no preference or reward training, no pretraining stage"),
    (r"overwrite_cache|dataset_prepared_path|dataset_dir|cache_dir|.*cache_path",
     _always, "prepared data is cached under a fingerprint of all that decides it (HANDLOOP_CACHE says where)", ""),
    (r"tokenized_path|skip_prepare_dataset", _off, "data is read as text and tokenised here",
     "data is read as text and tokenised here: name the texts in --data.path"),
    (r"logging_.+|log_.+|disable_tqdm|plot_loss|include_(num_input_)?tokens.*",
     _always, "every step is recorded and shown in the terminal; handloop report draws it", ""),
    (r"dataloader_drop_last", _off, "an epoch has all samples", "an epoch has all samples, also in its last step"),
    (r"accelerator_config", _is_even, "batch.per_device are the samples of one process",
     "batch.per_device are the samples of one process: divide theirs by the number of GPUs"),
    (r"ignore_data_skip", _off, "a resumed run goes on with the samples that come next",
     "a resumed run goes on with the samples that come next"),
    (r"dataloader_.+|remove_unused_columns|label_names|length_column_name",
     _always, "batches are a function of the seed and the step; fields that nothing reads are counted", ""),
    (r"preprocessing_.+|shuffle_(dataset|merged_datasets)|data_seed", _always,
     "all cores prepare the data, and each epoch has an order of its own by train.seed", ""),
    (r"average_tokens_across_devices", _is("true"), "each trained token of a step counts the same, on every GPU",
     "each trained token of a step counts the same, on every GPU"),
    (r"gradient_checkpointing_kwargs|activation_checkpointing_kwargs|use_reentrant.*|use_cache|torch_empty_cache_.+",
     _always, "the engine recomputes whole blocks by itself", ""),
    (r"(per_device_|per_gpu_)?eval_batch_size|eval_accumulation_steps|eval_(sample_)?packing|prediction_loss_only|"
     r"eval_(do_concat|use_gather).*|include_for_metrics|batch_eval_metrics|bf16_full_eval|fp16_full_eval",
     _always, "validation makes micro-batches of its own, as large as fit", ""),
    (r"eval_delay", _is(0), "validation begins with the run", "validation comes as validate.every says from the start"),
    (r"metric_for_best_model", _is("eval_loss", "loss"), "the lowest validation loss is the best",
     "the lowest validation loss is the best; there is no other measure"),
    (r"greater_is_better", _off, "the lowest validation loss is the best",
     "the lowest validation loss is the best; there is no other measure"),
    (r"local_rank|world_size|ddp|ddp_.+|device_map|low_cpu_mem_usage|max_memory|num_processes|skip_memory_.+",
     _always, "accelerate's configuration has the processes, --memory.budget the memory", ""),
    (r"peft_type", _is("lora"), "adapters are LoRA on a causal language model", "adapters are LoRA's alone"),
    (r"task_type", _is("causal_lm"), "adapters are LoRA on a causal language model",
     "what is trained is a causal language model, with the head that it has"),
    (r"(lora_)?fan_in_fan_out", _off, "weights are stored as (out, in)",
     "weights are read as (out, in), as torch's Linear has them"),
    (r"inference_mode|auto_mapping|peft_version|runtime_config|lora_on_cpu|megatron_.+|qalora_group_size",
     _always, "adapters are LoRA on a causal language model", ""),
    (r"tf32", _always, "products are in model.dtype", ""),
    (r"bias", _is("none"), "adapters have no bias", "biases stay frozen"),
    (r"lora_bias", _off, "adapters have no bias", "adapters have no bias"),
    (r"adam_beta1", _is(0.9), ADAM, f"{ADAM}, and they are no options"),
    (r"adam_beta2", _is(0.999), ADAM, f"{ADAM}, and they are no options"),
    (r"adam_epsilon", _is(1e-8), ADAM, f"{ADAM}, and they are no options"),
    (r"save_only_model|save_safetensors|save_on_each_node|save_first_step|auto_resume.+|enable_jit_checkpoint|"
     r"restore_callback.+|peft_autocast_adapter_dtype", _always,
     "a checkpoint has all that resuming needs, as safetensors and JSON", ""),
    (r"tokenizer_use_fast|use_fast_tokenizer", _is("true"), "tokenizers are the fast ones",
     "tokenizers are the fast ones, which may split texts otherwise"),
    (r"model_type|type_of_model", _is_causal, "config.json says the class of the model",
     "what is trained is a causal language model, with the head that it has"),
    (r"wandb_mode", _is("online"), "--track.wandb auto reports where there is a key",
     "set WANDB_MODE in the environment, or --track.wandb off"),
    (r"wandb_(watch|log_model)", _off, "Weights & Biases is sent figures, and no weights",
     "Weights & Biases is sent figures, and no weights or gradients"),
    (r"dataset_text_field|field_text", _is("text", "none"), "the field of raw text is text",
     "the field of raw text is text; rename the column"),
    (r"strict|group_by_length_.+|is_.+_derived_model|tokenizer_type|hf_use_auth_token|.*token_env.*|"
     r"wandb_(entity|name|run_id)|run_name",
     _always, "config.json, the environment (HF_TOKEN, WANDB_ENTITY) and the run folder's name say it", ""),
)  # fmt: skip
MISSING = (
    (r"fsdp.*|deepspeed.*|.*parallel.*|sequence_parallel.*|context_parallel.*|tensor_parallel.*|ring_attn.*|zero_.+",
     "several GPUs hold one replica each (DDP); --memory.budget streams a model that is too large, and "
     "--batch.context_parallel N shares rows that are too long"),
    (r"push_to_hub|push_.+|hub_.+", "after training: handloop export RUN --format adapter --push OWNER/NAME"),
    (r"(hf_|hub_|ms_|om_)?(hub_)?token|.*api_key", "secrets are not options: set HF_TOKEN or WANDB_API_KEY"),
    (r"trust_remote_code|custom_.+", "no code from the hub is run"),
    (r"template|chat_template|conversation_template|prompt_(template|style)|default_system(_message)?|tool_format",
     "there are no template names: the tokenizer's own is taken, and of a base without one, such as Llama-3.1-8B, "
     "'### User: / ### Assistant:'; --data.chat_template FILE names a Jinja file, such as the Instruct model's"),
    (r"dataset_config(_name)?|dataset_(train|test)_split|dataset_split|subset|split|eval_split",
     "written with the data: --data.path owner/name:subset:split"),
    (r"field_(instruction|input|output|system)|(prompt|response|completion|input|output|question|answer)_(column|field|"
     r"key)|formatting_func|dataset_(prompt|response)_field", "write --data.fields prompt=COLUMN response=COLUMN"),
    (r"max_samples|num_samples|streaming|buffer_size|dataset_streaming|pretraining_dataset|mix_strategy|interleave_probs",
     "all rows are read; --data.weights says how often each path is seen, --train.max_steps ends early"),
    (r"eos_token|pad_token|special_tokens|eot_tokens|added_tokens_overrides|tokenizer_config|tokenizer_name.*|tokenizer",
     "the tokenizer beside the model decides; padding is masked by position, never by id"),
    (r"config(_file|_name|_path)?|yaml", "handloop import-config FILE reads other trainers' configuration files"),
    (r"rl|beta|.*dpo.*|.*kto.*|.*orpo.*|.*simpo.*|.*ppo.*|.*grpo.*|reward_.+|num_generations|reference_.+|ref_model.*",
     "supervised fine-tuning alone; no preference or reward training"),
    (r"torch_compile.*|fp8.*|nvfp4.*|gptq.*|awq.*|hqq.*|qat.*|peft", "not offered: NF4, int8 or 16 bits, "
     "in kernels of our own or of bitsandbytes"),
    (r"label_smoothing.*", "the loss is cross entropy of the tokens themselves"),
    (r"auto_find_batch_size", "micro-batches are split and merged to fit anyway; --batch.per_device stays as given"),
    (r"n_?gpus?|num_gpus|gpus|nproc_per_node|gpu_ids|devices",
     "--profile multi_gpu takes all GPUs (CUDA_VISIBLE_DEVICES those you want)"),
    (r"loss_watchdog_.+", "a run ends at a loss that is no number, and at no other"),
    (r"stop_after|max_time|time_limit", "stop it by SIGTERM: it saves and resumes; --train.max_steps ends it early"),
    (r"compute_metrics|predict_with_generate|do_predict", "handloop compare RUN asks questions after training"),
    (r"use_(qalora|bdlora)|(velora|monteclora|arrow|kasa)_config|alora_.+|layer_replication|ensure_weight_tying",
     "not offered: adapters are plain LoRA on every layer that lora.target_modules names (docs/TUNING.md)"),
    (r"trainable_token_indices", "lora.trainable_tokens names the tokens themselves"),
    (r"layers_(to_transform|pattern)|rank_pattern|alpha_pattern|exclude_modules|target_parameters|peft_layers_.+",
     "name the layers by a regular expression: --lora.target_modules 'model.layers.[0-7].self_attn.q_proj'"),
    (r"cosine_min_lr_ratio|lr_scheduler_kwargs|lr_quadratic.+|lr_groups|embedding_lr.*|loraplus_lr_embedding|lr_.+",
     "the schedule has a warmup and a linear, cosine or constant decay to 0 (optim.schedule)"),
)  # fmt: skip


def why(name: str, given: Any) -> Reason | None:
    """Why there is no option in the place of `name`; None for a name that no trainer is known to have."""
    for pattern, is_so, so, otherwise in ANYWAY:
        if re.fullmatch(pattern, name):
            return Reason(so, True) if is_so(given) else Reason(otherwise, False, is_told_when_off=True)
    if known := reason_for(name):
        return Reason(known, False)
    text = next((text for pattern, text in MISSING if re.fullmatch(pattern, name)), "")
    return Reason(text, False) if text else None
