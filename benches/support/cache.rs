//! What brings inputs of a launch out of the cache.

/// Bytes that are written between two launches: more than the L2 cache of any GPU so far (126 MB on a B200).
pub const EVICTS: usize = 256 << 20;
