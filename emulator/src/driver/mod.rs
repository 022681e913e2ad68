//! The exported CUDA driver API.
