"""Task files in lm-eval's format; `{folder}` has letters.json."""

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/letters.json"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: ["a", "b", "c"]
metric_list: [{{metric: acc}}]
"""
ANSWER = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/letters.json"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "a"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/letters.json"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
