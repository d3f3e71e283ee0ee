"""What users of other trainers type for an option: our option, or what to do instead."""

_OPTIONS = {
    "batch_size data.batch_size bs train_batch_size global_batch": "data.global_batch_size",
    "micro_batch_size microbatch mbs per_device_train_batch_size device_batch_size":
        "data.microbatch_size",
    "data data_dir data_path dataset dataset_path dataset_dir train_data corpus": "data.path",
    "input_file train_file train_files text": "data.input",
    "seq_length sequence_length context_length context_size context block_size max_length ctx_len":
        "data.seq_len",
    "make_vocab_size_divisible_by pad_vocab_size_multiple padded_vocab_multiple":
        "data.vocab_multiple",
    "num_layers n_layer layers num_hidden_layers depth": "model.n_layers",
    "hidden_size hidden_dim d_model n_embd embed_dim width": "model.dim",
    "intermediate_size ffn_hidden_size d_ff": "model.ffn_dim",
    "num_heads n_head heads num_attention_heads": "model.n_heads",
    "num_kv_heads num_key_value_heads n_query_groups": "model.n_kv_heads",
    "head_size kv_channels": "model.head_dim",
    "window window_size attention_window": "model.sliding_window",
    "qkv_bias add_qkv_bias bias": "model.attention_bias",
    "qk_layernorm use_qk_norm": "model.qk_norm",
    "learning_rate max_lr peak_lr": "optim.lr",
    "optimizer optim": "optim.name",
    "warmup num_warmup_steps warmup_iters lr_warmup_steps": "optim.warmup_steps",
    "lr_scheduler lr_scheduler_type scheduler lr_schedule": "optim.schedule",
    "min_lr lr_min": "optim.min_lr_ratio",
    "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm":
        "optim.max_grad_norm",
    "step max_steps num_steps train_steps total_steps iterations iters max_iters": "steps",
    "max_tokens num_tokens train_tokens": "tokens",
    "config_file conf yaml": "config",
    "output output_folder out out_dir outdir save_dir checkpoint_dir": "output_dir",
    "run run_name experiment experiment_name exp_name": "name",
    "random_seed": "seed",
    "save_steps save_interval save_every checkpoint_interval checkpoint_every":
        "checkpoint.interval_steps",
    "save_total_limit keep_last keep": "checkpoint.keep_latest",
    "init pretrained from_pretrained load load_from initial_checkpoint": "checkpoint.init_from",
    "eval_steps eval_interval eval_every val_interval validation_interval":
        "validate.interval_steps",
    "logging_steps log_steps log_interval log_every": "metrics.interval_steps",
    "bf16 precision mixed_precision amp dtype": "parallel.param_dtype",
    "fp8": "parallel.float8",
    "gradient_checkpointing activation_checkpoint": "parallel.activation_checkpointing",
    "torch_compile": "parallel.compile",
    "dropout": "layer_dropout.p_max",
}  # fmt: skip
_REMEDIES = {
    "fp16 float16 half": "set --parallel.param_dtype to bfloat16 or float32",
    "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches accum":
        "set --data.microbatch_size, the sequences a rank takes at once: the rest of its share of "
        "--data.global_batch_size is accumulated",
    "epochs epoch num_epochs num_train_epochs max_epochs":
        "set --steps or --tokens; the first lines of a run count the epochs",
    "resume resume_from resume_from_checkpoint auto_resume":
        "leave it out, the same command resumes; with another --name, --checkpoint.resume_from "
        "branches a run off and --checkpoint.init_from starts from given weights",
    "tokenizer tokenizer_path tokenizer_name":
        "leave it out, a dataset has its own: python -m data.prepare --tokenizer MODEL",
    "gpus num_gpus devices nproc_per_node nproc num_processes world_size nnodes num_nodes":
        "give it to torchrun, as in torchrun --nproc_per_node=8 train/main.py",
    "device accelerator": "leave it out, training takes the GPUs there are, or the CPU",
    "num_workers workers dataloader_num_workers":
        "leave it out, one thread of a rank reads ahead; data.prepare has --workers",
    "preset model model_name model_size size":
        "name a preset first, as in train/main.py layerskip_110m, see --help",
}  # fmt: skip
SYNONYMS = {
    word: meant
    for table in (_OPTIONS, _REMEDIES)
    for words, meant in table.items()
    for word in words.split()
}
"""{what is typed, without its dashes: the option, or what to do instead}."""
