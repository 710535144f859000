"""Commands of the README, docs and examples that no test composes, each with the reason."""

NOT_COMPOSED = {
    "python -m trainer --help": "takes no settings",
    "python -m trainer --version": "takes no settings",
    "python -m trainer mixer=lsh --help": "tests/trainer/config/test_key_help.py",
    "python -m trainer mixer=sliding --help mixer.window": "tests/trainer/config/test_key_help.py",
    "longspan --completion fish | source": "tests/longspan/test_completion.py",
    "python -m examples.score_text runs/example 'import torch'": "tests/test_examples.py",
    "python -m examples.train_in_python runs/example": "tests/test_examples.py",
    (
        "torchrun --nproc-per-node=2 -m examples.train_in_python runs/shared parallel.context=2"
    ): "two ranks; tests/test_examples.py runs one",
    "torchrun --nproc-per-node=3 examples/shard_a_layer.py": "tests/test_examples.py",
    "python -m scripts.export runs/tuned exported format=huggingface dtype=bfloat16": (
        "tests/trainer/test_export_huggingface.py"
    ),
    (
        "python -m trainer model=hub model.path=models/llama init_from=hf:models/llama data=files"
        " data.path=texts/*.txt data.tokenizer=models/llama run_dir=runs/tuned"
        " context_length=8192 batch_tokens=65536 parallel.context=4 precision=bfloat16"
    ): "needs a model; tests/trainer/init_from/test_huggingface.py",
    (
        "python -m trainer model=hub model.path=models/llama init_from=hf:models/llama"
        " position=yarn position.factor=4 position.original_length=8192 position.theta=500000"
        " context_length=32768 batch_tokens=131072 parallel.context=8"
    ): "needs a model; tests/trainer/init_from/test_huggingface.py",
    'python -m scripts.generate models/llama prompt="Once upon a time" tokens=50': (
        "needs a model; tests/trainer/init_from/test_hub_folder.py"
    ),
    (
        "python -m scripts.evaluate models/llama data=files data.path=texts/*.txt"
        " data.tokenizer=models/llama context_length=8192 batch_tokens=65536 parallel.context=4"
    ): "needs a model; tests/trainer/init_from/test_hub_folder.py",
    "python -m scripts.doctor": "names the command; the settings stand in other places",
    "python -m scripts.doctor mixer._target_=mine.Averaged parallel.context=2": (
        "mine.Averaged is the reader's own; tests/trainer/preflight/test_foreign.py has such layers"
    ),
    "python -m scripts.agree": "trains twenty runs; tests/trainer/verify/test_whole_runs.py",
    "python -m scripts.agree engines": "trains 52 runs; tests/trainer/verify/test_whole_runs.py",
    "python -m scripts.bench attention": "a measurement of minutes",
    "python -m scripts.bench reading steps=1 step_ms=8000": "settings of the bench's own",
    "python -m scripts.bench experts": "a measurement of minutes",
    "python -m scripts.bench cache": "tests/scripts/benchmarks/test_cache.py",
    (
        'python -m scripts.generate runs/mine prompt="def " samples=8 cache=paged cache.pages=64'
        " preempt=swap"
    ): "needs a run; tests/trainer/decoding/test_preemption.py",
    "python -m scripts.experiments induction": "an experiment of minutes",
    "python -m scripts.experiments eviction": "an experiment of minutes",
    "python -m scripts.experiments quantized": "an experiment of minutes",
    "python -m scripts.experiments quantized run=runs/quickstart": "needs the quickstart's run",
    "python -m scripts.experiments quantized seeds=1": "an experiment of minutes",
    (
        'python -m scripts.generate runs/mine prompt="def " tokens=5000 overflow=shift context=512'
        " n_keep=4"
    ): "needs a run; tests/trainer/decoding/test_context_limit.py",
    (
        'python -m scripts.generate runs/mine prompt="def " tokens=5000 cache=streaming'
        " cache.budget=256"
    ): "needs a run; tests/trainer/decoding/test_context_limit.py",
    "python -m scripts.bench decode": "a measurement of minutes",
    "python -m scripts.bench memory repeats=11": "a measurement of minutes",
    "python -m scripts.bench mixers": "a measurement of minutes",
    "python -m scripts.bench time": "a measurement of minutes",
    "python -m scripts.chaos": "many launches; tests/trainer/verify/test_killed.py, test_faults.py",
    "python -m scripts.chaos only=saves": "a measurement that needs quiet cores",
    (
        "python -m scripts.evaluate exported parallel.context=3 evaluation=heldout"
    ): "needs an export; tests/trainer/evaluation/test_offline.py",
    (
        "python -m scripts.evaluate runs/full runs/sliding evaluation=[needle,recall]"
        " evaluation.needle.lengths=[512,2048] json=rows.jsonl"
    ): "needs two runs; tests/trainer/evaluation/test_offline.py",
    "python -m scripts.experiments experts": "an experiment of minutes",
    "python -m scripts.experiments graphs": "an experiment of minutes",
    "python -m scripts.experiments graphs only=trust": "an experiment of minutes",
    "python -m scripts.experiments alignment": "an experiment of minutes",
    "python -m scripts.experiments seq2seq": "an experiment of half an hour",
    "python -m scripts.experiments sets": "an experiment of minutes",
    "python -m scripts.experiments sets only=distinct": "an experiment of minutes",
    "python -m scripts.experiments.libreoffice_pairs pairs": "see test_libreoffice_pairs.py",
    "python -m scripts.experiments translation pairs=pairs seeds=1": "an experiment of minutes",
    (
        "python -m scripts.generate runs/mine prompt='Click OK.' beams=4 length_penalty=0.6"
    ): "needs a run; tests/trainer/decoding/test_targets.py",
    (
        "python -m scripts.generate runs/mine prompts=sources.txt output=targets.jsonl"
    ): "needs a run; tests/trainer/decoding/test_targets.py",
    "python -m scripts.experiments memory first=3": "an experiment of 50 minutes",
    "python -m scripts.experiments recall only=queries seeds=2": "an experiment of minutes",
    "python -m scripts.experiments recall only=tracking seeds=3 first=2": "14 minutes",
    "python -m scripts.export runs/mine exported": "needs a run; tests/trainer/test_export.py",
    "python -m scripts.export runs/mine exported trust=true": "needs a run; test_export.py",
    "python -m scripts.fuzz seed=1 many=300": "300 runs; tests/trainer/verify/test_fuzz.py",
    "python -m scripts.export runs/mine adapter format=peft": "needs a run; test_adapters.py",
    "python -m scripts.lengths runs/extend": "needs a run; evaluation/test_by_length.py",
    "python -m scripts.generate --help": "takes no settings",
    'python -m scripts.generate runs/mine prompt="def " tokens=200': "needs a run; test_command.py",
    "python -m scripts.generate runs/mine prompts=prompts.txt output=texts.jsonl samples=4": (
        "needs a run; tests/trainer/decoding/test_command.py"
    ),
    'python -m scripts.generate exported prompt="class " stop=class temperature=0': (
        "needs an export; tests/trainer/decoding/test_command.py"
    ),
    "python -m scripts.offload": "needs a GPU",
    "python -m scripts.kernels": "names the command; tests/trainer/planning/test_kernel_table.py",
    (
        "python -m scripts.kernels model=full precision=bfloat16 context_length=32768 device=h200"
    ): "tests/trainer/planning/test_kernel_table.py",
    "python -m scripts.bench context": "minutes; tests/scripts/benchmarks/test_context.py",
    "python -m scripts.bench steps": "minutes; tests/scripts/benchmarks/test_steps.py",
    "python -m scripts.bench sparse": "minutes; tests/scripts/benchmarks/test_sparse.py",
    "python -m scripts.bench plan ranks=2": "minutes; tests/trainer/planning/test_step_plan.py",
    "python -m scripts.calibrate out=mine.yaml": "tests/trainer/planning/test_calibration.py",
    "python -m scripts.kernels compile=true": "tests/models/kernels/triton_attention",
    "python -m scripts.plan experiment=quickstart device=mine.yaml": "tests/trainer/planning",
    (
        "python -m scripts.plan model=full model.width=4096 model.layers=32 model.heads=32 "
        "model.kv_heads=8 model.ffn=14336 model.vocabulary=128256 precision=bfloat16 "
        "context_length=1048576 batch_tokens=1048576 engine=single engine.checkpointing=full "
        "engine.tile_tokens=32768 engine.head_groups=8 engine.offload_activations=true "
        "engine.offload=optimizer gpus=1 device=h200 search=false"
    ): "minutes; tests/trainer/planning",
    "python -m scripts.plan experiment=quickstart gpus=4 device=h100": "tests/trainer/planning",
    "python -m scripts.parity": "the full product; tests/parallel/drivers/test_parity.py",
    "python -m scripts.parity quick": "minutes; tests/parallel/drivers/test_parity.py",
    "python -m scripts.report sweeps/mine": "needs a sweep; tests/trainer/reports",
    **dict.fromkeys(
        [
            "longspan --config-dir=conf experiment=mine launch.dry_run=true",
            "longspan --config-dir=conf experiment=mine run_dir=runs/mine",
            (
                "torchrun --nproc-per-node=2 -m trainer --config-dir=conf experiment=mine"
                " parallel.context=2 run_dir=runs/shared"
            ),
            (
                "longspan --config-dir=conf -m experiment=mine mixer.temperature=0.5,2"
                " hydra.sweep.dir=sweeps/mine"
            ),
            'python -m scripts.generate runs/mine trust=true prompt="import " tokens=20',
            "python -m scripts.doctor --config-dir=conf experiment=mine parallel.context=2",
        ],
        "needs a folder of the reader's own; tests/longspan/test_wheel.py",
    ),
    "python -m scripts.report": "names the command; tests/trainer/reports",
    "python -m scripts.parity mixer._target_=examples.own_mixer.Cosine": (
        "30 comparisons; tests/scripts/test_parity.py makes some"
    ),
    "python -m scripts.bench part mixer._target_=examples.own_mixer.Cosine tokens=4096": (
        "tests/scripts/benchmarks/test_part.py"
    ),
    "python -m scripts.report sweeps/mine baseline=mixer.temperature=2": (
        "needs a sweep; tests/trainer/reports/test_comparison.py"
    ),
    "python -m scripts.report sweeps/needle": "needs a sweep; tests/trainer/reports",
    "python -m scripts.report sweeps/quickstart": "needs a sweep; tests/trainer/reports",
}
