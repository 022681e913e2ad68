//! A bound on single allocations: beyond it the allocator returns null, as a machine with little memory would. Code
//! that asks for memory by a number in a file then ends the process, and code that tries first gives its sentence. The
//! fuzzer's own limits need a sanitizer, or look once a second.

use std::alloc::{GlobalAlloc, Layout, System};

/// Bytes of the largest allocation. Inputs have a few thousand bytes; deflate expands them by at most 1032.
pub const LARGEST: usize = 256 << 20;

struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

// SAFETY: the system's allocator, which is allowed to return null.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as promised by the caller.
        if layout.size() > LARGEST { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as promised by the caller.
        if layout.size() > LARGEST { std::ptr::null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller; every pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as promised by the caller; every pointer came from `System`.
        if size > LARGEST { std::ptr::null_mut() } else { unsafe { System.realloc(pointer, layout, size) } }
    }
}
