"""transformers' suites run only if this folder is named, as `make test-suites` does. They have marks of their own."""

from pathlib import Path

MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config):
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: of transformers' suites; needs an accelerator")


def pytest_ignore_collect(collection_path, config):
    return None if any(Path(__file__).parent.name in argument for argument in config.args) else True
