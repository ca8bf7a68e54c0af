"""Small tasks for the lm-evaluation-harness, with their data in files, so without a download."""

import json

import yaml

# Question, choices, the right one.
CHOICE = [
    ("A wet towel left in the sun becomes", ["dry", "wetter", "heavier than before", "a stone"], 0),
    ("Before cutting bread, one takes a", ["knife", "pillow", "letter", "candle made of wax"], 0),
    ("Ice that is heated turns into", ["sand", "water", "wood", "a different kind of metal"], 1),
    (
        "The mug fell from the shelf onto the stone floor and",
        ["flew away", "sang", "broke", "grew"],
        2,
    ),
    ("To see the stars well one should look up at", ["noon", "breakfast", "the floor", "night"], 3),
    ("Fish breathe", ["with gills", "through their tails", "only on land", "smoke"], 0),
]
FERRY = (
    "The ferry left the harbour a little after six. Nobody stood at the rail, because the wind "
    "came straight from the north and carried rain with it. In the saloon an old man was repairing "
    "a net, knot by knot, and a girl asked him whether the fish would not see it. They see it, he "
    "said, but they do not know what a net is."
)
PUMP = (
    "A pump that stands still is a pump that rusts. Run it for ten minutes every month, and write "
    "the date on the card."
)
ROLLING = [FERRY, PUMP]
GENERATE = [
    "The three primary colours are red,",
    "Monday, Tuesday, Wednesday,",
    "1, 2, 3, 4, 5,",
    "The capital of Italy is",
]

# Each task's file, without its name and data. The last three cannot be run.
TASKS: dict[str, dict] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "local_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_too_long": {
        "output_type": "multiple_choice",
        "doc_to_text": "a",
        "doc_to_choice": "{{[text * 250, 'b']}}",
        "doc_to_target": 0,
    },
    "local_beams": {
        "output_type": "generate_until",
        "doc_to_text": "a",
        "doc_to_target": "b",
        "generation_kwargs": {"num_beams": 4},
    },
    "local_no_temperature": {
        "output_type": "generate_until",
        "doc_to_text": "a",
        "doc_to_target": "b",
        "generation_kwargs": {"do_sample": True},
    },
}
ROWS = {
    "local_choice": [
        {"question": question, "choices": choices, "answer": answer}
        for question, choices, answer in CHOICE
    ],
    "local_rolling": [{"text": text} for text in ROLLING],
    "local_generate": [{"text": text, "answer": "green"} for text in GENERATE],
}


def write_tasks(folder):
    """Write TASKS into a folder, for --include-path."""
    for name, settings in TASKS.items():
        rows = ROWS.get(name, [{"text": "x"}])
        write_task(folder, name, rows, {**settings, "test_split": "test"})


def write_task(folder, name, rows, settings):
    """Write a task over these rows, which are in every split that it may want."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test", "dev"), str(data))
    where = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**settings, **where}))
