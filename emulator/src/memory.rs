//! The global memory of one device.
//!
//! An address is the host address of the byte, inside a range reserved once, so that host-pinned and managed memory
//! have the same address on both sides.

use std::fmt;

/// A live allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// First byte.
    pub address: u64,
    /// Size as asked for.
    pub bytes: u64,
    /// Number of the allocation, from 1, in the order they were made.
    pub serial: u64,
    /// Host-pinned or managed: readable by the host, always initialised, not counted as used.
    pub host: bool,
}

/// Why an access from the host was refused. Display is a whole sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryError {
    /// The CUresult: 1 (invalid value).
    pub code: u32,
    /// The sentence.
    pub message: String,
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MemoryError {}

/// One device's global memory. All methods are safe to call from several threads.
pub struct Memory {}

impl Memory {
    /// Memory of at most `limit` bytes in use at a time.
    pub fn new(limit: u64) -> Self {
        let _ = limit;
        unimplemented!()
    }
    /// Allocates device memory, poisoned and marked uninitialised; None when the limit is exceeded or `bytes` is 0. Aligned to 512.
    pub fn alloc(&self, bytes: u64) -> Option<u64> {
        let _ = bytes;
        unimplemented!()
    }
    /// Allocates memory that the host may touch by its address (pinned, managed): zeroed, initialised, outside the limit.
    pub fn alloc_host(&self, bytes: u64) -> Option<u64> {
        let _ = bytes;
        unimplemented!()
    }
    /// Frees an allocation by its first address.
    pub fn free(&self, at: u64) -> Result<(), MemoryError> {
        let _ = at;
        unimplemented!()
    }
    /// Copies from the host; the range must lie in one allocation.
    pub fn copy_in(&self, to: u64, from: &[u8]) -> Result<(), MemoryError> {
        let _ = (to, from);
        unimplemented!()
    }
    /// Copies to the host; bytes never written come as poison.
    pub fn copy_out(&self, from: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let _ = (from, to);
        unimplemented!()
    }
    /// Copies inside the device, also the knowledge of which bytes are initialised.
    pub fn copy_within(&self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        let _ = (to, from, bytes);
        unimplemented!()
    }
    /// Fills `count` elements of `pattern.len()` bytes (1, 2 or 4).
    pub fn set(&self, to: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let _ = (to, pattern, count);
        unimplemented!()
    }
    /// Makes an allocation as fresh: poisoned and uninitialised. For memory that a graph allocates anew in each launch.
    pub fn forget(&self, at: u64) -> Result<(), MemoryError> {
        let _ = at;
        unimplemented!()
    }
    /// Bytes in use.
    pub fn used(&self) -> u64 {
        unimplemented!()
    }
    /// The limit.
    pub fn limit(&self) -> u64 {
        unimplemented!()
    }
    /// Live allocations by address.
    pub fn live(&self) -> Vec<Allocation> {
        unimplemented!()
    }
    /// The live allocation that holds an address.
    pub fn find(&self, address: u64) -> Option<Allocation> {
        let _ = address;
        unimplemented!()
    }
}
