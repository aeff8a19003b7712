"""What vLLM reads from the environment before it is imported: one process, a small cache, no word to anybody outside."""

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the test's own process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two cores may be shared
    "OMP_NUM_THREADS": "2",
    "TORCHDYNAMO_DISABLE": "1",  # no C++ compiler is asked for
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
