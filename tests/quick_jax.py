"""How JAX compiles in tests: compiling is where its time goes, far more than running what is compiled."""

# Half of the time to compile is saved.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def cache(folder: str) -> dict[str, str]:
    """Environment variables with which processes that share a folder compile nothing twice."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
