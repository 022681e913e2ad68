//! The driver API end to end through cudarc: devices, memory, streams, events, capture, graphs, pools, occupancy,
//! refusals.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a kernel or a call the arguments that it declares, or wrong ones on purpose"
)]

mod support;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream, LaunchConfig, PushKernelArg, result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use support::{code, device, kernel, last_message, module};

const BASIC: &str = include_str!("kernels/basic.ptx");
const MEMORY: usize = 64 << 20;

fn load() {
    support::load(&[("CUDA_EMU_DEVICES", "3"), ("CUDA_EMU_MEMORY", "64M"), ("CUDA_EMU_SMS", "4")]);
}

fn shape(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

fn assert_says(words: &[&str]) {
    let message = last_message();
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn devices_and_attributes() {
    load();
    assert_eq!(CudaContext::device_count().unwrap(), 3);
    let (context, _) = device(1);
    assert_eq!(context.compute_capability().unwrap(), (8, 0));
    assert_eq!(context.total_mem().unwrap(), MEMORY);
    assert!(context.name().unwrap().contains("emulator"));
    let (other, _) = device(0);
    assert_ne!(context.uuid().unwrap().bytes, other.uuid().unwrap().bytes);
    use sys::CUdevice_attribute_enum::*;
    for (attribute, value) in [
        (CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32),
        (CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 4),
        (CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024),
        (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49_152),
        (CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 166_912),
        (CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65_536),
        (CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1),
    ] {
        assert_eq!(context.attribute(attribute).unwrap(), value, "{attribute:?}");
    }
    assert_eq!(code(CudaContext::new(3)), CUresult::CUDA_ERROR_INVALID_DEVICE);
    assert_says(&["no device 3"]);
}

#[test]
fn names_and_texts_of_errors() {
    load();
    let error = result::DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(error.error_name().unwrap(), c"CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(error.error_string().unwrap(), c"an illegal memory access was encountered");
}

#[test]
fn copies_and_fills_arrive() {
    load();
    let (context, stream) = device(0);
    let host: Vec<u32> = (0..1000).collect();
    let mut a = stream.clone_htod(&host).unwrap();
    let mut b = stream.alloc_zeros::<u32>(1000).unwrap();
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [0; 1000]);
    stream.memcpy_dtod(&a.slice(100..200), &mut b.slice_mut(0..100)).unwrap();
    assert_eq!(stream.clone_dtoh(&b).unwrap()[..101], [(100..200).collect::<Vec<u32>>(), vec![0]].concat());
    stream.memset_zeros(&mut a).unwrap();
    assert_eq!(stream.clone_dtoh(&a).unwrap(), [0; 1000]);
    // Synchronous forms, and nothing at all.
    let address = unsafe { result::malloc_sync(64) }.unwrap();
    unsafe {
        result::memset_d8_sync(address, 7, 64).unwrap();
        let mut bytes = [0u8; 64];
        result::memcpy_dtoh_sync(&mut bytes, address).unwrap();
        assert_eq!(bytes, [7; 64]);
        result::memcpy_htod_sync::<u8>(address, &[]).unwrap();
        result::free_sync(address).unwrap();
    }
    assert_eq!(stream.null::<f32>().unwrap().num_bytes(), 0);
    context.synchronize().unwrap();
}

#[test]
fn copies_out_of_bounds_are_refused_with_the_nearest_allocation() {
    load();
    let (_context, stream) = device(0);
    let slice = stream.alloc_zeros::<u8>(100).unwrap();
    let (address, _guard) = cudarc::driver::DevicePtr::device_ptr(&slice, &stream);
    let mut out = [0u8; 8];
    let refused = unsafe { result::memcpy_dtoh_async(&mut out, address + 96, stream.cu_stream()) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["100 bytes"]);
    // Not sticky: the context goes on.
    unsafe { result::memcpy_dtoh_async(&mut out, address + 92, stream.cu_stream()) }.unwrap();
    // A device pointer where a host pointer belongs.
    let confused = unsafe { std::slice::from_raw_parts(address as *const u8, 8) };
    let refused = unsafe { result::memcpy_htod_async(address, confused, stream.cu_stream()) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["passed as a host pointer"]);
}

/// Ranges and boxes whose end, in bytes, is beyond 2^64: such a sum must not wrap into an allocation.
#[test]
fn sizes_that_wrap_are_refused() {
    load();
    let (_context, stream) = device(0);
    let (at, handle) = (unsafe { result::malloc_sync(4096) }.unwrap(), stream.cu_stream());
    unsafe { result::memset_d8_sync(at, 7, 4096) }.unwrap();
    let mut host = [1u8; 64];
    let refused = |what: &str, answer: CUresult| {
        assert_eq!(answer, CUresult::CUDA_ERROR_INVALID_VALUE, "{what}");
    };
    let most = usize::MAX;
    unsafe {
        // Elements times their size: 2^63 words of 2 bytes are 0 bytes in 64 bits, 2^62 + 1 of 4 are 4.
        refused("D16", sys::cuMemsetD16_v2(at, 1, 1 << 63));
        assert_says(&["do not end inside the address space"]);
        refused("D32", sys::cuMemsetD32_v2(at, 1, (1 << 62) + 1));
        refused("D32, asynchronous", sys::cuMemsetD32Async(at, 1, (1 << 62) + 1, handle));
        refused("D8", sys::cuMemsetD8_v2(at, 1, most));
        // Rows times the pitch, rows that overlap, and rows that would never end.
        refused("D2D8", sys::cuMemsetD2D8_v2(at, 1 << 32, 1, 16, (1 << 32) + 1));
        refused("D2D32", sys::cuMemsetD2D32_v2(at, 1 << 63, 1, (1 << 62) + 1, 3));
        refused("D2D8 without a pitch", sys::cuMemsetD2D8_v2(at, 0, 1, 16, most));
        assert_says(&["rows of 16 bytes do not fit pitch 0"]);
        // Whole ranges.
        refused("DtoD", sys::cuMemcpyDtoD_v2(at, at + 64, most - 32));
        refused("DtoH", sys::cuMemcpyDtoH_v2(host.as_mut_ptr().cast(), at, most));
        refused("HtoD", sys::cuMemcpyHtoD_v2(at, host.as_ptr().cast(), most));
        refused("any to any", sys::cuMemcpy(at, at + 64, most));
        // A pitched allocation whose rounded width is 0.
        let (mut pitched, mut pitch) = (0, 0);
        refused("pitch", sys::cuMemAllocPitch_v2(&mut pitched, &mut pitch, most - 5, 2, 4));
        refused("registered", sys::cuMemHostRegister_v2(host.as_mut_ptr().cast(), most - 8, 0));
        // Pools count what is asked of them.
        assert_eq!(sys::cuMemAllocAsync(&mut pitched, 64, handle), CUresult::CUDA_SUCCESS);
        let mut other = 0;
        assert_eq!(sys::cuMemAllocAsync(&mut other, most, handle), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert_eq!(sys::cuMemFreeAsync(pitched, handle), CUresult::CUDA_SUCCESS);
    }
    let (memory, none) = (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, std::ptr::null_mut());
    let flat = |x: usize, y: usize, pitch: usize, width: usize, height: usize| {
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: x,
            srcY: y,
            srcMemoryType: memory,
            srcHost: none,
            srcDevice: at,
            srcArray: none.cast(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: memory,
            dstHost: none,
            dstDevice: at + 2048,
            dstArray: none.cast(),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: height,
        };
        unsafe { sys::cuMemcpy2D_v2(&copy) }
    };
    assert_eq!(flat(0, 1, 64, 16, 2), CUresult::CUDA_SUCCESS);
    refused("2D, x", flat(most - 8, 0, 64, 16, 1));
    refused("2D, x and width", flat(most - 8, 0, most, 16, 2));
    refused("2D, y times pitch", flat(0, 1 << 32, 1 << 32, 16, 1));
    refused("2D, rows times pitch", flat(0, 0, 1 << 32, 16, (1 << 32) + 1));
    refused("2D, address", flat(0, 1, (most as u64 - at + 1) as usize, 16, 1));
    let deep = |z: usize, rows: usize, pitch: usize, height: usize, depth: usize| {
        let copy = sys::CUDA_MEMCPY3D {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: z,
            srcLOD: 0,
            srcMemoryType: memory,
            srcHost: none,
            srcDevice: at,
            srcArray: none.cast(),
            reserved0: none,
            srcPitch: pitch,
            srcHeight: rows,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: memory,
            dstHost: none,
            dstDevice: at + 2048,
            dstArray: none.cast(),
            reserved1: none,
            dstPitch: pitch,
            dstHeight: rows,
            WidthInBytes: 16,
            Height: height,
            Depth: depth,
        };
        unsafe { sys::cuMemcpy3D_v2(&copy) }
    };
    assert_eq!(deep(1, 2, 64, 2, 2), CUresult::CUDA_SUCCESS);
    // One slice of whatever size.
    assert_eq!(deep(0, most, 64, 2, 1), CUresult::CUDA_SUCCESS);
    refused("3D, a slice", deep(0, most, 64, 2, 2));
    refused("3D, z times slice", deep(1 << 32, 1 << 16, 1 << 16, 1, 1));
    refused("3D, slices", deep(0, 1 << 16, 1 << 16, 1, (1 << 32) + 1));
    let mut out = [0u8; 4096];
    unsafe { result::memcpy_dtoh_async(&mut out, at, handle) }.unwrap();
    assert!(out == [7; 4096] && host == [1; 64], "something has been written");
    unsafe { result::free_sync(at) }.unwrap();
}

#[test]
fn freed_memory_is_not_freed_twice_or_used() {
    load();
    let (_context, stream) = device(0);
    let address = unsafe { result::malloc_sync(256) }.unwrap();
    let inside = unsafe { result::free_sync(address + 4) };
    assert_eq!(code(inside), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["4 bytes inside one of 256 bytes"]);
    unsafe { result::free_sync(address) }.unwrap();
    assert_eq!(code(unsafe { result::free_sync(address) }), CUresult::CUDA_ERROR_INVALID_VALUE);
    let again = unsafe { result::free_async(address, stream.cu_stream()) };
    assert_eq!(code(again), CUresult::CUDA_ERROR_INVALID_VALUE);
    let used = unsafe { result::memset_d8_sync(address, 0, 4) };
    assert_eq!(code(used), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn memory_runs_out_and_comes_back() {
    load();
    // Device 2, which no other test uses.
    let (context, stream) = device(2);
    let free = context.mem_get_info().unwrap().0;
    assert!(free <= MEMORY);
    let half = unsafe { stream.alloc::<u8>(MEMORY / 2) }.unwrap();
    let refused = unsafe { stream.alloc::<u8>(MEMORY) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_says(&["67108864 bytes were asked for"]);
    drop(half);
    // The pool keeps the freed memory until a synchronisation, and gives it back when it is needed.
    let refilled = unsafe { stream.alloc::<u8>(MEMORY / 4 * 3) }.unwrap();
    drop(refilled);
    context.synchronize().unwrap();
    assert_eq!(context.mem_get_info().unwrap().0, free);
    assert_eq!(code(unsafe { result::malloc_sync(0) }), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn pinned_and_managed_memory_have_one_address_on_both_sides() {
    load();
    let (context, stream) = device(0);
    let fill = kernel(&context, BASIC, "fill");
    let mut pinned = unsafe { context.alloc_pinned::<f32>(32) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(1.0);
    let copied = stream.clone_htod(&pinned).unwrap();
    assert_eq!(stream.clone_dtoh(&copied).unwrap(), [1.0; 32]);

    let mut managed = unsafe { context.alloc_unified::<f32>(32, true) }.unwrap();
    managed.as_mut_slice().unwrap().fill(3.0);
    let mut launch = stream.launch_builder(&fill);
    launch.arg(&mut managed).arg(&5.0f32).arg(&16i32);
    unsafe { launch.launch(shape(1, 32)) }.unwrap();
    stream.synchronize().unwrap();
    assert_eq!(managed.as_slice().unwrap()[15..17], [5.0, 3.0]);
    managed.prefetch().unwrap();
}

#[test]
fn kernels_see_blocks_threads_and_parameters() {
    load();
    let (context, stream) = device(0);
    let basic = module(&context, BASIC);
    let indices = basic.load_function("indices").unwrap();
    let (grid, block) = ((3u32, 2, 2), (5u32, 3, 2));
    let count = (3 * 2 * 2 * 5 * 3 * 2) as usize;
    let mut out = stream.alloc_zeros::<i32>(count).unwrap();
    let config = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: 0 };
    let mut launch = stream.launch_builder(&indices);
    launch.arg(&mut out);
    unsafe { launch.launch(config) }.unwrap();
    let mut expected = Vec::new();
    for bz in 0..grid.2 {
        for by in 0..grid.1 {
            for bx in 0..grid.0 {
                for tz in 0..block.2 {
                    for ty in 0..block.1 {
                        for tx in 0..block.0 {
                            expected.push((bx | by << 4 | bz << 8 | tx << 12 | ty << 16 | tz << 20) as i32);
                        }
                    }
                }
            }
        }
    }
    assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);

    #[repr(C)]
    struct Mixed {
        c: i8,
        d: f64,
        s: [i16; 3],
        f: [f32; 2],
    }
    // SAFETY: plain data with the layout that nvcc gives the struct of the kernel (float2 is aligned to 8).
    unsafe impl cudarc::driver::DeviceRepr for Mixed {}
    let value = Mixed { c: -2, d: 2.5, s: [1, 2, 3], f: [0.0, 4.5] };
    // float2 starts at 24 in C; as two floats it would too: c at 0, d at 8, s at 16, f at 24.
    assert_eq!((std::mem::offset_of!(Mixed, d), std::mem::size_of::<Mixed>()), (8, 32));
    let mut padded = [0u8; 32];
    padded[0] = value.c as u8;
    padded[8..16].copy_from_slice(&value.d.to_le_bytes());
    padded[20..22].copy_from_slice(&value.s[2].to_le_bytes());
    padded[28..32].copy_from_slice(&value.f[1].to_le_bytes());
    let mixed = basic.load_function("mixed").unwrap();
    let mut out = stream.alloc_zeros::<f64>(8).unwrap();
    let mut launch = stream.launch_builder(&mixed);
    launch.arg(&mut out).arg(&-1i8).arg(&padded).arg(&-3i16).arg(&(1i64 << 40)).arg(&0.5f32);
    unsafe { launch.launch(shape(1, 1)) }.unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    assert_eq!(out, [-1.0, -2.0, 2.5, 3.0, 4.5, -3.0, (1i64 << 40) as f64, 0.5]);
}

#[test]
fn module_variables_are_read_and_written_from_the_host() {
    load();
    let (context, stream) = device(0);
    let basic = module(&context, BASIC);
    let scaled = basic.load_function("scaled").unwrap();
    let mut x = stream.alloc_zeros::<f32>(4).unwrap();
    let run = |x: &mut cudarc::driver::CudaSlice<f32>| {
        let mut launch = stream.launch_builder(&scaled);
        launch.arg(&mut *x);
        unsafe { launch.launch(shape(1, 4)) }.unwrap();
        stream.clone_dtoh(x).unwrap()
    };
    assert_eq!(run(&mut x), [2.0, 4.0, 8.0, 16.0]);
    let mut scale = basic.get_global("scale", &stream).unwrap();
    assert_eq!(cudarc::driver::DeviceSlice::len(&scale), 4);
    stream.memcpy_htod(&3.0f32.to_le_bytes(), &mut scale).unwrap();
    let mut table = basic.get_global("table", &stream).unwrap();
    let numbers: Vec<u8> = [5.0f32, 6.0, 7.0, 8.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    stream.memcpy_htod(&numbers, &mut table).unwrap();
    assert_eq!(run(&mut x), [15.0, 18.0, 21.0, 24.0]);
    assert_eq!(code(basic.get_global("nothing", &stream)), CUresult::CUDA_ERROR_NOT_FOUND);
}

#[test]
fn a_function_pointer_goes_from_a_variable_through_the_host_to_a_kernel() {
    load();
    let (context, stream) = device(0);
    let pointers = module(&context, include_str!("kernels/pointers.ptx"));
    let by_argument = pointers.load_function("by_argument").unwrap();
    let table = stream.clone_dtoh(&pointers.get_global("table", &stream).unwrap()).unwrap();
    let functions: Vec<u64> = table.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
    let mut out = stream.alloc_zeros::<f32>(8).unwrap();
    for (function, want) in functions.iter().zip([|x: f32| x + 3.0, |x| x - 3.0, |x| 3.0 * x]) {
        let mut launch = stream.launch_builder(&by_argument);
        launch.arg(&mut out).arg(function).arg(&8i32);
        unsafe { launch.launch(shape(1, 8)) }.unwrap();
        let found = stream.clone_dtoh(&out).unwrap();
        assert!((0..8).all(|i| found[i] == want(i as f32) + (i as f32 - 1.0)), "{found:?}");
    }
    // A kernel's handle is none.
    let mut launch = stream.launch_builder(&by_argument);
    launch.arg(&mut out).arg(&0x1234_5678u64).arg(&8i32);
    let refused = unsafe { launch.launch(shape(1, 8)) };
    assert_eq!(code(refused.map(|_| ())), CUresult::CUDA_ERROR_INVALID_PC);
    assert_says(&["kernel by_argument", "PTX line", "calls address 0x12345678, where no function begins"]);
}

#[test]
fn wrong_launches_are_refused_and_do_no_harm() {
    load();
    let (context, stream) = device(0);
    let basic = module(&context, BASIC);
    let fill = basic.load_function("fill").unwrap();
    let bounded = basic.load_function("bounded").unwrap();
    let mut x = stream.alloc_zeros::<f32>(2048).unwrap();
    for (grid, block, word) in [
        ((0, 1, 1), (32, 1, 1), "the grid has 0 blocks in x"),
        ((1, 65_536, 1), (32, 1, 1), "65536 blocks in y"),
        ((1, 1, 1), (0, 1, 1), "the block has 0 threads in x"),
        ((1, 1, 1), (1025, 1, 1), "1025 threads in x"),
        ((1, 1, 1), (64, 32, 1), "the block has 2048 threads"),
        ((1, 1, 1), (1, 1, 65), "65 threads in z"),
    ] {
        let mut launch = stream.launch_builder(&fill);
        launch.arg(&mut x).arg(&1.0f32).arg(&1i32);
        let config = LaunchConfig { grid_dim: grid, block_dim: block, shared_mem_bytes: 0 };
        assert_eq!(code(unsafe { launch.launch(config) }), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_says(&["fill", word]);
    }
    let mut launch = stream.launch_builder(&bounded);
    launch.arg(&mut x);
    assert_eq!(code(unsafe { launch.launch(shape(1, 129)) }), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["129 threads", "at most 128"]);
    unsafe { launch.launch(shape(1, 128)) }.unwrap();
    assert_eq!(bounded.max_threads_per_block().unwrap(), 128);

    let missing = basic.load_function("no_such_kernel");
    assert_eq!(code(missing), CUresult::CUDA_ERROR_NOT_FOUND);
    assert_says(&["no_such_kernel", "axpy"]);
    // No parameters where the kernel wants some.
    let bare = unsafe {
        sys::cuLaunchKernel(
            fill.cu_function(),
            1,
            1,
            1,
            32,
            1,
            1,
            0,
            stream.cu_stream(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    assert_eq!(bare, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["has 3 parameters"]);
    assert_eq!(stream.clone_dtoh(&x).unwrap()[..129], [[1.0; 128].as_slice(), &[0.0]].concat());
}

#[test]
fn dynamic_shared_memory_needs_the_attribute_beyond_48_kib() {
    load();
    use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
    let (context, stream) = device(0);
    let reverse = kernel(&context, BASIC, "reverse");
    let host: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let mut x = stream.clone_htod(&host).unwrap();
    let mut run = |bytes: u32| {
        let mut launch = stream.launch_builder(&reverse);
        launch.arg(&mut x);
        let config = LaunchConfig { shared_mem_bytes: bytes, ..shape(1, 256) };
        code(unsafe { launch.launch(config) })
    };
    assert_eq!(run(1024), CUresult::CUDA_SUCCESS);
    assert_eq!(run(49_153), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_says(&["49153 bytes of dynamic shared memory", "MAX_DYNAMIC_SHARED_SIZE_BYTES"]);
    assert_eq!(code(reverse.set_attribute(MOST, 166_913)), CUresult::CUDA_ERROR_INVALID_VALUE);
    reverse.set_attribute(MOST, 166_912).unwrap();
    assert_eq!(run(166_912), CUresult::CUDA_SUCCESS);
    // Reversed twice.
    assert_eq!(stream.clone_dtoh(&x).unwrap(), host);
}

#[test]
fn a_fault_names_everything_and_stays() {
    load();
    let (context, stream) = device(0);
    let basic = module(&context, BASIC);
    let store_at = basic.load_function("store_at").unwrap();
    let mut x = stream.alloc_zeros::<f32>(16).unwrap();
    let mut launch = stream.launch_builder(&store_at);
    launch.arg(&mut x).arg(&17i64);
    let refused = unsafe { launch.launch(shape(1, 1)) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_says(&["store_at", "block (0,0,0)", "thread (0,0,0)", "st.global", "64 bytes"]);
    // Everything after it returns the same code, as on a real driver.
    assert_eq!(code(context.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(code(stream.clone_dtoh(&x)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(code(stream.alloc_zeros::<f32>(1)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_says(&["earlier fault", "store_at"]);
    std::mem::forget(x); // cannot be freed any more
    // Another context of the same device is untouched.
    let (_fresh, stream) = device(0);
    assert_eq!(stream.clone_dtoh(&stream.alloc_zeros::<u8>(3).unwrap()).unwrap(), [0; 3]);
}

#[test]
fn traps_and_misaligned_stores_have_their_own_codes() {
    load();
    for (name, expected) in
        [("misaligned", CUresult::CUDA_ERROR_MISALIGNED_ADDRESS), ("trapping", CUresult::CUDA_ERROR_LAUNCH_FAILED)]
    {
        let (context, stream) = device(0);
        let function = kernel(&context, BASIC, name);
        let mut x = stream.alloc_zeros::<u8>(16).unwrap();
        let mut launch = stream.launch_builder(&function);
        if name == "misaligned" {
            launch.arg(&mut x);
        }
        assert_eq!(code(unsafe { launch.launch(shape(1, 1)) }), expected);
        assert_says(&[name]);
        std::mem::forget(x);
    }
}

#[test]
fn memory_freed_before_the_launch_is_an_illegal_address() {
    load();
    let (context, stream) = device(0);
    let fill = kernel(&context, BASIC, "fill");
    let x = stream.alloc_zeros::<f32>(16).unwrap();
    let address = { cudarc::driver::DevicePtr::device_ptr(&x, &stream).0 };
    drop(x);
    let mut launch = stream.launch_builder(&fill);
    launch.arg(&address).arg(&1.0f32).arg(&16i32);
    assert_eq!(code(unsafe { launch.launch(shape(1, 32)) }), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_says(&["fill"]);
}

#[test]
fn bad_images_are_refused_with_line_and_reason() {
    load();
    let (context, _stream) = device(0);
    let load = |text: String| code(context.load_module(cudarc::nvrtc::Ptx::from_src(text)));
    let header = ".version 7.0\n.target sm_80\n.address_size 64\n";
    let body = |line: &str| format!("{header}.visible .entry k()\n{{\n.reg .b32 %r<4>;\n{line}\nret;\n}}\n");
    assert_eq!(load(body("mov.b32 %r1, 1;")), CUresult::CUDA_SUCCESS);
    assert_eq!(load(body("frobnicate.b32 %r1, 1;")), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_says(&["line 7", "frobnicate"]);
    assert_eq!(load(header.replace("7.0", "99.0")), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    assert_says(&["99.0"]);
    assert_eq!(load(header.replace("sm_80", "sm_90")), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_says(&["sm_90"]);
    assert_eq!(load("hello".into()), CUresult::CUDA_ERROR_INVALID_IMAGE);
    assert_eq!(load("\u{7f}ELF".into()), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
    assert_says(&["cubin"]);
    assert_eq!(
        code(context.load_module(cudarc::nvrtc::Ptx::from_file("/no/such.ptx"))),
        CUresult::CUDA_ERROR_FILE_NOT_FOUND
    );

    // The same reason arrives in the JIT's error log.
    let text = std::ffi::CString::new(body("frobnicate.b32 %r1, 1;")).unwrap();
    let mut log = [0u8; 256];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<std::ffi::c_void>(), log.len() as *mut _];
    let mut handle = std::ptr::null_mut();
    let answer = unsafe {
        sys::cuModuleLoadDataEx(&mut handle, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    assert_eq!(answer, CUresult::CUDA_ERROR_INVALID_PTX);
    let logged = std::ffi::CStr::from_bytes_until_nul(&log).unwrap().to_str().unwrap();
    assert!(logged.contains("line 7") && logged.contains("frobnicate"), "{logged}");
    assert_eq!(values[1] as usize, logged.len());
}

#[test]
fn handles_are_recognised_after_their_end() {
    load();
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    let dead_stream = result::stream::create(result::stream::StreamKind::Default).unwrap();
    let dead_event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
    unsafe {
        result::stream::destroy(dead_stream).unwrap();
        result::event::destroy(dead_event).unwrap();
        assert_eq!(code(result::stream::synchronize(dead_stream)), CUresult::CUDA_ERROR_INVALID_HANDLE);
        assert_says(&["was destroyed"]);
        assert_eq!(code(result::stream::destroy(dead_stream)), CUresult::CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(code(result::event::record(dead_event, stream.cu_stream())), CUresult::CUDA_ERROR_INVALID_HANDLE);
        let image = std::ffi::CString::new(BASIC).unwrap();
        let module = result::module::load_data(image.as_ptr().cast()).unwrap();
        let function = result::module::get_function(module, c"no_parameters".into()).unwrap();
        result::launch_kernel(function, (1, 1, 1), (1, 1, 1), 0, stream.cu_stream(), &mut []).unwrap();
        result::module::unload(module).unwrap();
        let refused = result::launch_kernel(function, (1, 1, 1), (1, 1, 1), 0, stream.cu_stream(), &mut []);
        assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_HANDLE);
        assert_eq!(code(result::module::unload(module)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
}

#[test]
fn events_are_ordered_and_timed() {
    load();
    let (context, stream) = device(0);
    let fill = kernel(&context, BASIC, "fill");
    let mut x = stream.alloc_zeros::<f32>(1 << 16).unwrap();
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.record_event(timed).unwrap();
    for _ in 0..10 {
        let mut launch = stream.launch_builder(&fill);
        launch.arg(&mut x).arg(&1.0f32).arg(&(1i32 << 16));
        unsafe { launch.launch(shape(256, 256)) }.unwrap();
    }
    let end = stream.record_event(timed).unwrap();
    assert!(start.is_complete() && end.is_complete());
    let milliseconds = start.elapsed_ms(&end).unwrap();
    assert!(milliseconds > 0.0 && milliseconds < 60_000.0, "{milliseconds} ms");
    assert!(end.elapsed_ms(&start).unwrap() < 0.0);
    let untimed = stream.record_event(None).unwrap();
    assert_eq!(code(start.elapsed_ms(&untimed)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    let never = context.new_event(timed).unwrap();
    assert_eq!(code(start.elapsed_ms(&never)), CUresult::CUDA_ERROR_INVALID_HANDLE);
    assert!(never.is_complete());
    // An event of one context cannot be recorded in another's stream.
    let (_other, stream_of_other) = device(0);
    let foreign = unsafe { result::event::record(start.cu_event(), stream_of_other.cu_stream()) };
    assert_eq!(code(foreign), CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn work_of_several_streams_is_ordered_by_events() {
    load();
    // With cudarc's own tracking: every launch waits for and records events.
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    let (one, two) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let axpy = kernel(&context, BASIC, "axpy");
    let x = one.clone_htod(&[1.0f32; 100]).unwrap();
    let mut y = two.alloc_zeros::<f32>(100).unwrap();
    for stream in [&one, &two, &one, &two] {
        let mut launch = stream.launch_builder(&axpy);
        launch.arg(&2.0f32).arg(&x).arg(&mut y).arg(&100i32);
        unsafe { launch.launch(shape(1, 128)) }.unwrap();
    }
    let forked = two.fork().unwrap();
    forked.join(&one).unwrap();
    assert_eq!(forked.clone_dtoh(&y).unwrap(), [8.0; 100]);
    assert_eq!(context.new_stream_with_priority(-3).unwrap().synchronize(), Ok(()));
}

/// Captures y = 2 x + y on `stream`.
fn capture_axpy(
    stream: &Arc<CudaStream>,
    work: impl FnOnce(&Arc<CudaStream>),
) -> Result<Option<cudarc::driver::CudaGraph>, result::DriverError> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    work(stream);
    stream.end_capture(sys::CUgraphInstantiate_flags(0))
}

#[test]
fn a_graph_is_captured_once_and_launched_often() {
    load();
    for seed in ["none", "1", "2", "3"] {
        support::configure("seed", seed);
        let (context, stream) = device(0);
        let basic = module(&context, BASIC);
        let (axpy, fill) = (basic.load_function("axpy").unwrap(), basic.load_function("fill").unwrap());
        let mut x = stream.alloc_zeros::<f32>(100).unwrap();
        let mut y = stream.alloc_zeros::<f32>(100).unwrap();
        let side = context.new_stream().unwrap();
        let graph = capture_axpy(&stream, |stream| {
            // Two branches: x on another stream, which joins before x is used.
            side.join(stream).unwrap();
            let mut launch = side.launch_builder(&fill);
            launch.arg(&mut x).arg(&3.0f32).arg(&100i32);
            unsafe { launch.launch(shape(1, 128)) }.unwrap();
            stream.join(&side).unwrap();
            let mut launch = stream.launch_builder(&axpy);
            launch.arg(&2.0f32).arg(&x).arg(&mut y).arg(&100i32);
            unsafe { launch.launch(shape(1, 128)) }.unwrap();
        });
        let graph = graph.unwrap().expect("a graph");
        // Nothing ran during the capture.
        assert_eq!(stream.clone_dtoh(&y).unwrap(), [0.0; 100]);
        for _ in 0..20 {
            graph.launch().unwrap();
        }
        assert_eq!(stream.clone_dtoh(&y).unwrap(), [120.0; 100]);
        graph.upload().unwrap();
    }
}

#[test]
fn memory_of_a_graph_lives_from_its_node_to_its_free() {
    load();
    let (context, stream) = device(0);
    let basic = module(&context, BASIC);
    let (copy, fill) = (basic.load_function("copy").unwrap(), basic.load_function("fill").unwrap());
    let mut y = stream.alloc_zeros::<f32>(64).unwrap();
    let graph = capture_axpy(&stream, |stream| {
        let mut inner = unsafe { stream.alloc::<f32>(64) }.unwrap();
        let mut launch = stream.launch_builder(&fill);
        launch.arg(&mut inner).arg(&4.0f32).arg(&64i32);
        unsafe { launch.launch(shape(1, 64)) }.unwrap();
        let mut launch = stream.launch_builder(&copy);
        launch.arg(&inner).arg(&mut y).arg(&64i32);
        unsafe { launch.launch(shape(1, 64)) }.unwrap();
    });
    let graph = graph.unwrap().unwrap();
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [4.0; 64]);
    // Memory that a capture did not allocate cannot be freed in it.
    let outside = stream.alloc_zeros::<f32>(4).unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    drop(outside);
    assert_eq!(code(context.check_err()), CUresult::CUDA_ERROR_INVALID_VALUE);
    let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    assert_eq!(code(ended.map(|_| ())), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // In the next launch the memory of a graph is as fresh as in the first: reading it before writing is a fault.
    let graph = capture_axpy(&stream, |stream| {
        let mut inner = unsafe { stream.alloc::<f32>(64) }.unwrap();
        let mut launch = stream.launch_builder(&copy);
        launch.arg(&inner).arg(&mut y).arg(&64i32);
        unsafe { launch.launch(shape(1, 64)) }.unwrap();
        let mut launch = stream.launch_builder(&fill);
        launch.arg(&mut inner).arg(&4.0f32).arg(&64i32);
        unsafe { launch.launch(shape(1, 64)) }.unwrap();
    });
    let graph = graph.unwrap().unwrap();
    assert_eq!(code(graph.launch()), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert_says(&["copy", "nothing has written"]);
    std::mem::forget(y);
}

#[test]
fn captures_refuse_what_a_gpu_refuses() {
    load();
    use sys::CUstreamCaptureMode::*;
    let (context, stream) = device(0);
    let other = context.new_stream().unwrap();
    let finish = |expected: CUresult| {
        let end = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map(|_| ());
        assert_eq!(code(end), expected);
        assert_eq!(stream.capture_status().unwrap(), sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
    };
    let begin = || stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let outside = other.record_event(None).unwrap();

    // An event recorded outside.
    begin();
    assert_eq!(code(stream.wait(&outside)), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(stream.capture_status().unwrap(), sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    assert_eq!(code(stream.alloc_zeros::<u8>(1)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    // Waiting for the stream, the context, or a captured event.
    begin();
    assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin();
    assert_eq!(code(context.synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin();
    let inside = stream.record_event(None).unwrap();
    assert_eq!(code(inside.synchronize()), CUresult::CUDA_ERROR_CAPTURED_EVENT);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    // Calls that may synchronise or allocate; in relaxed mode they are allowed.
    begin();
    assert_eq!(code(unsafe { result::malloc_sync(16) }), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    let address = unsafe { result::malloc_sync(16) }.unwrap();
    begin();
    assert_eq!(
        code(unsafe { result::memset_d8_sync(address, 0, 16) }),
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    );
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    unsafe { result::memset_d8_sync(address, 0, 16) }.unwrap();
    finish(CUresult::CUDA_SUCCESS);
    unsafe { result::free_sync(address) }.unwrap();

    // Work that is not joined, ends in the wrong place, begins twice, or was never begun.
    begin();
    let mut x = unsafe { stream.alloc::<u8>(8) }.unwrap();
    other.join(&stream).unwrap();
    other.memset_zeros(&mut x).unwrap();
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    std::mem::forget(x);
    begin();
    other.join(&stream).unwrap();
    let wrong = other.end_capture(sys::CUgraphInstantiate_flags(0)).map(|_| ());
    assert_eq!(code(wrong), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin();
    assert_eq!(code(stream.begin_capture(CU_STREAM_CAPTURE_MODE_GLOBAL)), CUresult::CUDA_ERROR_ILLEGAL_STATE);
    finish(CUresult::CUDA_SUCCESS);
    finish(CUresult::CUDA_ERROR_ILLEGAL_STATE);

    // Two captures cannot merge.
    begin();
    other.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let of_other = other.record_event(None).unwrap();
    assert_eq!(code(stream.wait(&of_other)), CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE);
    let end = other.end_capture(sys::CUgraphInstantiate_flags(0)).map(|_| ());
    assert_eq!(code(end), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    finish(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    // Another thread cannot end it.
    begin();
    let elsewhere = std::thread::scope(|scope| {
        let work = || code(stream.end_capture(sys::CUgraphInstantiate_flags(0)).map(|_| ()));
        scope.spawn(work).join().unwrap()
    });
    assert_eq!(elsewhere, CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    finish(CUresult::CUDA_SUCCESS);

    // Flags that contradict each other.
    begin();
    let flags = sys::CUgraphInstantiate_flags(1 | 4);
    assert_eq!(code(stream.end_capture(flags).map(|_| ())), CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn the_legacy_stream_cannot_capture_nor_be_used_beside_a_blocking_capture() {
    load();
    let (context, _stream) = device(0);
    let legacy = context.default_stream();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    assert_eq!(code(legacy.begin_capture(mode)), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    let mut x = legacy.alloc_zeros::<u8>(4).unwrap();
    let blocking = result::stream::create(result::stream::StreamKind::Default).unwrap();
    unsafe {
        result::stream::begin_capture(blocking, mode).unwrap();
        assert_eq!(code(legacy.memset_zeros(&mut x)), CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        assert_eq!(code(result::stream::end_capture(blocking)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        // Beside a non-blocking stream's capture it can.
        let stream = context.new_stream().unwrap();
        stream.begin_capture(mode).unwrap();
        legacy.memset_zeros(&mut x).unwrap();
        stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap();
        result::stream::destroy(blocking).unwrap();
    }
}

#[test]
fn host_functions_run_in_order_and_cannot_call_the_driver() {
    load();
    static SEEN: AtomicU32 = AtomicU32::new(0);
    static REFUSED: AtomicU32 = AtomicU32::new(0);
    unsafe extern "C" fn note(data: *mut std::ffi::c_void) {
        SEEN.store(data as u32, Ordering::SeqCst);
        REFUSED.store(unsafe { sys::cuCtxSynchronize() } as u32, Ordering::SeqCst);
    }
    let (_context, stream) = device(0);
    let answer = unsafe { sys::cuLaunchHostFunc(stream.cu_stream(), Some(note), 41 as *mut _) };
    assert_eq!(answer, CUresult::CUDA_SUCCESS);
    stream.synchronize().unwrap();
    assert_eq!(SEEN.load(Ordering::SeqCst), 41);
    assert_eq!(REFUSED.load(Ordering::SeqCst), CUresult::CUDA_ERROR_NOT_PERMITTED as u32);
}

#[test]
fn pools_keep_count_and_trim() {
    load();
    use sys::CUmemPool_attribute::*;
    let (context, stream) = device(0);
    context.bind_to_thread().unwrap();
    // SAFETY: zeroes are valid for this plain struct.
    let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
    properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    properties.maxSize = 4096;
    unsafe {
        let pool = result::mem_pool::create(&properties).unwrap();
        let read = |attribute| {
            let mut value = 0u64;
            result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()).unwrap();
            value
        };
        let mut threshold = 1024u64;
        result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut threshold).cast()).unwrap();
        let a = result::mem_pool::alloc_async(pool, 3000, stream.cu_stream()).unwrap();
        assert_eq!(read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT), 3000);
        let too_much = result::mem_pool::alloc_async(pool, 2000, stream.cu_stream());
        assert_eq!(code(too_much), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        result::free_async(a, stream.cu_stream()).unwrap();
        assert_eq!((read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT), read(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)), (0, 3000));
        stream.synchronize().unwrap();
        assert_eq!(read(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT), 1024);
        result::mem_pool::trim_to(pool, 100).unwrap();
        assert_eq!(read(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT), 100);
        assert_eq!(read(CU_MEMPOOL_ATTR_USED_MEM_HIGH), 3000);

        result::device::set_mem_pool(0, pool).unwrap();
        assert_eq!(result::device::get_mem_pool(0).unwrap(), pool);
        result::mem_pool::destroy(pool).unwrap();
        let default = result::device::get_default_mem_pool(0).unwrap();
        assert_eq!(result::device::get_mem_pool(0).unwrap(), default);
        assert_eq!(code(result::mem_pool::destroy(default)), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn several_host_threads_share_a_context() {
    load();
    let (context, stream) = device(0);
    let axpy = kernel(&context, BASIC, "axpy");
    let x = stream.clone_htod(&[1.0f32; 1000]).unwrap();
    // The streams of the threads do not wait for this one.
    stream.synchronize().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (context, axpy, x) = (&context, &axpy, &x);
            scope.spawn(move || {
                context.bind_to_thread().unwrap();
                let stream = context.new_stream().unwrap();
                let mut y = stream.clone_htod(&[thread as f32; 1000]).unwrap();
                for _ in 0..25 {
                    let mut launch = stream.launch_builder(axpy);
                    launch.arg(&1.0f32).arg(x).arg(&mut y).arg(&1000i32);
                    unsafe { launch.launch(shape(4, 256)) }.unwrap();
                }
                assert_eq!(stream.clone_dtoh(&y).unwrap(), [25.0 + thread as f32; 1000]);
            });
        }
    });
    // One stream, several threads: one launch after the other.
    let y = stream.alloc_zeros::<f32>(1000).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                context.bind_to_thread().unwrap();
                for _ in 0..25 {
                    let mut launch = stream.launch_builder(&axpy);
                    launch.arg(&1.0f32).arg(&x).arg(&y).arg(&1000i32);
                    unsafe { launch.launch(shape(4, 256)) }.unwrap();
                }
            });
        }
    });
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [100.0; 1000]);
}

/// Programs release resources in destructors of thread-locals. Those made before the first driver call run after
/// everything that the driver could clean up.
#[test]
fn the_driver_can_be_called_when_a_thread_ends() {
    static AT_THE_END: AtomicU32 = AtomicU32::new(u32::MAX);
    struct Last;
    impl Drop for Last {
        fn drop(&mut self) {
            let (mut context, mut pointer) = (std::ptr::null_mut(), 0);
            let calls = unsafe {
                [
                    sys::cuDevicePrimaryCtxRetain(&mut context, 2),
                    sys::cuCtxSetCurrent(context),
                    sys::cuMemAlloc_v2(&mut pointer, 64),
                    sys::cuMemFree_v2(pointer),
                    sys::cuDevicePrimaryCtxRelease_v2(2),
                    sys::cuDevicePrimaryCtxRelease_v2(2),
                ]
            };
            AT_THE_END.store(calls.iter().map(|&code| code as u32).sum(), Ordering::SeqCst);
        }
    }
    thread_local!(static LAST: Last = const { Last });
    load();
    let thread = std::thread::spawn(|| {
        LAST.with(|_| ());
        let mut context = std::ptr::null_mut();
        unsafe {
            assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, 2), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuCtxSetCurrent(context), CUresult::CUDA_SUCCESS);
            assert_ne!(sys::cuMemFree_v2(3), CUresult::CUDA_SUCCESS, "a message to keep");
        }
        support::configure("seed", "1");
    });
    thread.join().unwrap();
    assert_eq!(AT_THE_END.load(Ordering::SeqCst), CUresult::CUDA_SUCCESS as u32);
}

#[test]
fn two_devices_have_their_own_memory_and_copy_between_each_other() {
    load();
    let ((first, stream_0), (second, stream_1)) = (device(0), device(1));
    let here = stream_0.clone_htod(&[1.0f32, 2.0, 3.0]).unwrap();
    let there = stream_1.clone_dtod(&here).unwrap();
    assert_eq!(stream_1.clone_dtoh(&there).unwrap(), [1.0, 2.0, 3.0]);
    // A kernel on one device cannot reach the other's memory.
    let fill = kernel(&second, BASIC, "fill");
    let mut launch = stream_1.launch_builder(&fill);
    launch.arg(&here).arg(&1.0f32).arg(&3i32);
    assert_eq!(code(unsafe { launch.launch(shape(1, 3)) }), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    // The first device's context is not hurt by it.
    first.synchronize().unwrap();
    assert_eq!(stream_0.clone_dtoh(&here).unwrap(), [1.0, 2.0, 3.0]);
    // A function does not run in another context's stream.
    let foreign = kernel(&first, BASIC, "no_parameters");
    let (_third, stream_2) = device(1);
    let mut launch = stream_2.launch_builder(&foreign);
    assert_eq!(code(unsafe { launch.launch(shape(1, 1)) }), CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn occupancy_follows_warps_shared_memory_and_registers() {
    load();
    let (context, _stream) = device(0);
    let basic = module(&context, BASIC);
    let fill = basic.load_function("fill").unwrap();
    // 2048 threads of a multiprocessor, at most 32 blocks.
    let active = |threads, shared| fill.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None).unwrap();
    assert_eq!(active(256, 0), 8);
    assert_eq!(active(32, 0), 32);
    assert_eq!(active(1024, 0), 2);
    // 164 KiB over 40 KiB and the reserved 1 KiB a block.
    assert_eq!(active(32, 40 << 10), 4);
    extern "C" fn no_shared(_threads: std::ffi::c_int) -> usize {
        0
    }
    let (grid, block) = fill.occupancy_max_potential_block_size(no_shared, 0, 0, None).unwrap();
    assert_eq!((grid, block), (8, 1024));
    let free = fill.occupancy_available_dynamic_smem_per_block(2, 256).unwrap();
    assert_eq!(free, (82 << 10) - 1024);
}

#[test]
fn primary_contexts_are_counted() {
    load();
    let first = CudaContext::new(0).unwrap();
    let second = CudaContext::new(0).unwrap();
    assert_eq!(first.cu_ctx(), second.cu_ctx());
    let stream = second.new_stream().unwrap();
    drop(first);
    assert_eq!(stream.clone_dtoh(&stream.clone_htod(&[1u8, 2]).unwrap()).unwrap(), [1, 2]);
    let limit = sys::CUlimit::CU_LIMIT_PRINTF_FIFO_SIZE;
    second.set_limit(limit, 1 << 16).unwrap();
    assert_eq!(second.get_limit(limit).unwrap(), 1 << 16);
    second.set_cache_config(sys::CUfunc_cache::CU_FUNC_CACHE_PREFER_L1).unwrap();
    assert_eq!(second.get_cache_config().unwrap(), sys::CUfunc_cache::CU_FUNC_CACHE_PREFER_L1);
    second.set_blocking_synchronize().unwrap();
}

#[test]
fn what_is_left_alive_is_reported_as_a_leak() {
    load();
    let (context, stream) = device(1);
    let handle = context.cu_ctx() as usize;
    let forgotten = stream.alloc_zeros::<u8>(12_345).unwrap().leak();
    drop(stream);
    drop(context);
    let leaks = support::profile()["leaks"].to_string();
    assert!(leaks.contains("12345 bytes of stream-ordered device memory"), "{leaks}");
    assert!(leaks.contains("cuMemAllocAsync"), "{leaks}");
    assert!(forgotten != 0 && handle != 0);
}

#[test]
fn functions_are_found_by_name_and_version() {
    load();
    let mut address = std::ptr::null_mut();
    let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    let mut find = |name: &std::ffi::CStr| {
        let answer = unsafe { sys::cuGetProcAddress_v2(name.as_ptr(), &mut address, 12_040, 0, &mut status) };
        (answer, address as usize)
    };
    let (answer, found) = find(c"cuMemAlloc");
    assert_eq!(answer, CUresult::CUDA_SUCCESS);
    // SAFETY: only the address is used.
    let symbol = unsafe { *sys::culib().get::<unsafe extern "C" fn()>(b"cuMemAlloc_v2\0").unwrap() };
    assert_eq!(found, symbol as usize, "the name means its newest version");
    let (answer, found) = find(c"cuDriverGetVersion");
    assert_eq!(answer, CUresult::CUDA_SUCCESS);
    // SAFETY: that is the function's type.
    let version: unsafe extern "C" fn(*mut i32) -> i32 = unsafe { std::mem::transmute(found) };
    let mut number = 0;
    assert_eq!(unsafe { version(&mut number) }, 0);
    assert!(number >= 12_040);
    assert_eq!(find(c"cuNoSuchThing").0, CUresult::CUDA_ERROR_NOT_FOUND);
}

#[test]
fn what_is_not_emulated_says_so() {
    load();
    let (context, _stream) = device(0);
    context.bind_to_thread().unwrap();
    let answer = unsafe { result::external_memory::import_external_memory_opaque_fd(0, 4096) };
    assert_eq!(code(answer), CUresult::CUDA_ERROR_NOT_SUPPORTED);
    assert_says(&["cuImportExternalMemory", "not emulated"]);
}

#[test]
fn counters_of_a_launch_are_exact() {
    load();
    let (context, stream) = device(0);
    let axpy = kernel(&context, BASIC, "axpy");
    let x = stream.clone_htod(&[1.0f32; 256]).unwrap();
    let mut y = stream.clone_htod(&[1.0f32; 256]).unwrap();
    let mut launch = stream.launch_builder(&axpy);
    launch.arg(&1.0f32).arg(&x).arg(&mut y).arg(&256i32);
    unsafe { launch.launch(shape(2, 128)) }.unwrap();
    let counters = support::last_launch();
    assert_eq!(counters["name"], "axpy");
    // 8 warps: one fma, two loads and one store each; whole sectors of 32 bytes.
    for (name, value) in [
        ("fma", 8u64),
        ("global", 24),
        ("flops_f32", 512),
        ("global_load_bytes", 2048),
        ("global_store_bytes", 1024),
        ("global_sectors", 96),
        ("distinct_bytes", 2048),
        ("distinct_read_bytes", 2048),
        ("distinct_written_bytes", 1024),
        ("shared", 0),
        ("divergent_branches", 0),
        ("blocks", 2),
    ] {
        assert_eq!(counters[name].as_u64(), Some(value), "{name} in {counters:#}");
    }
}

#[test]
fn settings_of_a_thread_are_its_own() {
    load();
    let (_context, _stream) = device(0);
    assert_ne!(support::try_configure("checks", "bonds"), 0);
    assert_says(&["bonds", "uninitialised"]);
    assert_ne!(support::try_configure("colour", "red"), 0);
    assert_ne!(support::try_configure("kinds", "126,many"), 0);
    assert_says(&["kinds=many"]);
    support::configure("kinds", "126,1024");
    support::configure("kinds", "");
    support::configure("checks", "bounds,leaks");
    support::configure("seed", "12");
}

#[test]
fn contexts_are_attached_and_detached() {
    load();
    let mut own = std::ptr::null_mut();
    let mut attached = std::ptr::null_mut();
    unsafe {
        assert_eq!(sys::cuCtxCreate_v2(&mut own, 0, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxAttach(&mut attached, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuCtxAttach(&mut attached, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(attached, own);
        assert_eq!(sys::cuCtxDetach(own), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSynchronize(), CUresult::CUDA_SUCCESS, "one hold is left");
        let elsewhere = own as usize;
        let refused = std::thread::spawn(move || sys::cuCtxDetach(elsewhere as sys::CUcontext)).join().unwrap();
        assert_eq!(refused, CUresult::CUDA_ERROR_INVALID_CONTEXT);
        assert_eq!(sys::cuCtxDetach(own), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxDetach(own), CUresult::CUDA_ERROR_INVALID_CONTEXT);
    }
}

#[test]
fn launches_by_state_take_what_was_set_before() {
    load();
    let (context, stream) = device(0);
    let module = module(&context, BASIC);
    let mut fill = std::ptr::null_mut();
    let mut to = stream.alloc_zeros::<f32>(100).unwrap();
    {
        let (address, _guard) = cudarc::driver::DevicePtrMut::device_ptr_mut(&mut to, &stream);
        let mut address = address;
        unsafe {
            let mut raw = std::ptr::null_mut();
            let text = std::ffi::CString::new(BASIC).unwrap();
            assert_eq!(sys::cuModuleLoadData(&mut raw, text.as_ptr().cast()), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuModuleGetFunction(&mut fill, raw, c"fill".as_ptr()), CUresult::CUDA_SUCCESS);
            // Nothing is set yet: no block, no parameters.
            assert_eq!(sys::cuLaunchGrid(fill, 2, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuFuncSetBlockShape(fill, 0, 1, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuFuncSetBlockShape(fill, 32, 2, 1), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuLaunchGrid(fill, 2, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_says(&["fill", "the buffer has 0"]);
            assert_eq!(sys::cuParamSetv(fill, 0, (&raw mut address).cast(), 8), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuParamSetf(fill, 8, 2.5), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuParamSeti(fill, 12, 100), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuParamSeti(fill, 4094, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuParamSetSize(fill, 16), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuFuncSetSharedSize(fill, 1 << 20), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuLaunchGrid(fill, 2, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_says(&["dynamic shared memory"]);
            assert_eq!(sys::cuFuncSetSharedSize(fill, 64), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuLaunchGrid(fill, -1, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuFuncSetBlockShape(fill, 64, 1, 1), CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuLaunchGridAsync(fill, 2, 1, stream.cu_stream()), CUresult::CUDA_SUCCESS);
        }
    }
    assert_eq!(stream.clone_dtoh(&to).unwrap(), [2.5; 100]);
    drop(module);
}

#[test]
fn registered_host_memory_is_seen_by_kernels_at_another_address() {
    load();
    let (context, stream) = device(0);
    let axpy = kernel(&context, BASIC, "axpy");
    let mut host: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let pointer = host.as_mut_ptr();
    let bytes = 4000;
    let register = |pointer: *mut f32, bytes, flags| unsafe { sys::cuMemHostRegister_v2(pointer.cast(), bytes, flags) };
    let mut address = 0;
    unsafe {
        let unknown = sys::cuMemHostGetDevicePointer_v2(&mut address, pointer.cast(), 0);
        assert_eq!(unknown, CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(register(pointer, 0, 0), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(register(pointer, bytes, 4), CUresult::CUDA_ERROR_NOT_SUPPORTED);
        assert_eq!(register(pointer, bytes, 2), CUresult::CUDA_SUCCESS);
        let again = register(pointer.add(10), 40, 2);
        assert_eq!(again, CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        assert_eq!(sys::cuMemHostGetDevicePointer_v2(&mut address, pointer.add(10).cast(), 0), CUresult::CUDA_SUCCESS);
        let mut flags = 0;
        assert_eq!(sys::cuMemHostGetFlags(&mut flags, pointer.add(10).cast()), CUresult::CUDA_SUCCESS);
        assert_eq!(flags, 2);
        assert_ne!(address, pointer.add(10) as u64);
        // The pointer of one side is known on the other.
        let mut seen = 0u64;
        for (attribute, of, expected) in [
            (sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER, address, pointer.add(10) as u64),
            (sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER, pointer.add(10) as u64, address),
        ] {
            let asked = sys::cuPointerGetAttribute((&raw mut seen).cast(), attribute, of);
            assert_eq!((asked, seen), (CUresult::CUDA_SUCCESS, expected));
        }
    }
    // y += 2 x on the mirror of the host's elements from the tenth on.
    let x = stream.clone_htod(&[1.0f32; 500]).unwrap();
    let mut launch = stream.launch_builder(&axpy);
    launch.arg(&2.0f32).arg(&x).arg(&address).arg(&500i32);
    unsafe { launch.launch(shape(2, 256)) }.unwrap();
    let expected = |i: usize| i as f32 + if (10..510).contains(&i) { 2.0 } else { 0.0 };
    assert!((0..1000).all(|i| unsafe { pointer.add(i).read() } == expected(i)));
    // Copies and fills with the mirror's address reach the host memory, and the next kernel sees what the host writes.
    unsafe {
        result::memset_d8_sync(address, 0, 4).unwrap();
        assert_eq!(pointer.add(10).read(), 0.0);
        pointer.add(10).write(5.0);
        let mut launch = stream.launch_builder(&axpy);
        launch.arg(&1.0f32).arg(&x).arg(&address).arg(&1i32);
        launch.launch(shape(1, 1)).unwrap();
        let mut back = [0f32];
        result::memcpy_dtoh_sync(&mut back, address).unwrap();
        assert_eq!((back[0], pointer.add(10).read()), (6.0, 6.0));
    }
    // One element too many is still out of bounds.
    let mut far = [0f32; 2];
    let refused = unsafe { result::memcpy_dtoh_sync(&mut far, address + 4 * 989) };
    assert_eq!(code(refused), CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(code(unsafe { result::free_sync(address) }), CUresult::CUDA_ERROR_INVALID_VALUE);
    unsafe {
        assert_eq!(sys::cuMemHostUnregister(pointer.cast()), CUresult::CUDA_SUCCESS);
        let again = sys::cuMemHostUnregister(pointer.cast());
        assert_eq!(again, CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    }
    let mut launch = stream.launch_builder(&axpy);
    launch.arg(&1.0f32).arg(&x).arg(&address).arg(&1i32);
    assert_eq!(code(unsafe { launch.launch(shape(1, 1)) }), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    std::mem::forget(x);
}

#[test]
fn a_capture_tells_its_graph_and_what_comes_next() {
    load();
    let (_context, stream) = device(0);
    let mut x = stream.alloc_zeros::<u32>(8).unwrap();
    let info = || {
        let (mut graph, mut nodes, mut count) = (std::ptr::null_mut(), std::ptr::null(), 99);
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (handle, id) = (stream.cu_stream(), std::ptr::null_mut());
        let asked =
            unsafe { sys::cuStreamGetCaptureInfo_v2(handle, &mut status, id, &mut graph, &mut nodes, &mut count) };
        assert_eq!(asked, CUresult::CUDA_SUCCESS);
        let nodes = (0..count).map(|at| unsafe { nodes.add(at).read() }).collect::<Vec<_>>();
        (graph, nodes)
    };
    assert_eq!(info(), (std::ptr::null_mut(), vec![]));
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    let (open, none) = info();
    assert!(!open.is_null() && none.is_empty());
    stream.memset_zeros(&mut x).unwrap();
    let (_, first) = info();
    stream.memset_zeros(&mut x).unwrap();
    let (same, second) = info();
    assert_eq!((same, first.len(), second.len()), (open, 1, 1));
    assert_ne!(first, second);
    unsafe {
        let graph = result::stream::end_capture(stream.cu_stream()).unwrap();
        assert_eq!(graph, open);
        let (mut nodes, mut count) = ([std::ptr::null_mut(); 4], 4);
        assert_eq!(sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count), CUresult::CUDA_SUCCESS);
        assert_eq!(nodes[..count], [first[0], second[0]]);
        result::graph::destroy(graph).unwrap();
    }
}

#[test]
fn a_user_object_is_destroyed_with_its_last_graph() {
    load();
    static DESTROYED: AtomicU32 = AtomicU32::new(0);
    unsafe extern "C" fn note(data: *mut std::ffi::c_void) {
        DESTROYED.fetch_add(data as u32, Ordering::SeqCst);
        // It must not call the driver.
        DESTROYED.fetch_add(1000 * unsafe { sys::cuCtxSynchronize() } as u32, Ordering::SeqCst);
    }
    let destroyed = || DESTROYED.load(Ordering::SeqCst);
    let (_context, stream) = device(0);
    let object = |data: usize| unsafe {
        let mut object = std::ptr::null_mut();
        let made = sys::cuUserObjectCreate(&mut object, data as *mut _, Some(note), 1, 1);
        assert_eq!(made, CUresult::CUDA_SUCCESS);
        object
    };
    let (one, mode) = (object(1), sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED);
    unsafe {
        // The object goes to the graph while it is captured, from there to the executable graph and to a clone.
        result::stream::begin_capture(stream.cu_stream(), mode).unwrap();
        let (mut status, mut graph) = (sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE, std::ptr::null_mut());
        let nothing = std::ptr::null_mut::<u64>();
        sys::cuStreamGetCaptureInfo_v2(
            stream.cu_stream(),
            &mut status,
            nothing.cast(),
            &mut graph,
            nothing.cast(),
            nothing.cast(),
        );
        assert_eq!(sys::cuGraphRetainUserObject(graph, one, 1, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(result::stream::end_capture(stream.cu_stream()).unwrap(), graph);
        let (mut exec, mut clone) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut params: sys::CUDA_GRAPH_INSTANTIATE_PARAMS = std::mem::zeroed();
        params.flags = 1 | 4;
        let contradictory = sys::cuGraphInstantiateWithParams(&mut exec, graph, &mut params);
        assert_eq!((contradictory, params.result_out as u32), (CUresult::CUDA_ERROR_INVALID_VALUE, 1));
        params.flags = 1;
        let made = sys::cuGraphInstantiateWithParams(&mut exec, graph, &mut params);
        assert_eq!((made, params.result_out as u32), (CUresult::CUDA_SUCCESS, 0));
        assert_eq!(sys::cuGraphClone(&mut clone, graph), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphDestroy(graph), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphDestroy(clone), CUresult::CUDA_SUCCESS);
        assert_eq!(destroyed(), 0);
        assert_eq!(sys::cuGraphExecDestroy(exec), CUresult::CUDA_SUCCESS);
        let refused = 1000 * CUresult::CUDA_ERROR_NOT_PERMITTED as u32;
        assert_eq!(destroyed(), 1 + refused);
        assert_eq!(sys::cuUserObjectRelease(one, 1), CUresult::CUDA_ERROR_INVALID_HANDLE);
        // References of the program's own, and a graph's that are given back before its end.
        let (two, mut graph) = (object(2), std::ptr::null_mut());
        assert_eq!(sys::cuGraphCreate(&mut graph, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphRetainUserObject(graph, two, 2, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuGraphReleaseUserObject(graph, two, 3), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuUserObjectRetain(two, 1), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuUserObjectRelease(two, 2), CUresult::CUDA_SUCCESS);
        assert_eq!(destroyed(), 1 + refused);
        assert_eq!(sys::cuGraphReleaseUserObject(graph, two, 2), CUresult::CUDA_SUCCESS);
        assert_eq!(destroyed(), 3 + 2 * refused);
        assert_eq!(sys::cuGraphDestroy(graph), CUresult::CUDA_SUCCESS);
        let mut none = std::ptr::null_mut();
        assert_eq!(sys::cuUserObjectCreate(&mut none, none.cast(), None, 1, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

/// The threads that run kernels are not in the child, where a launch would wait for them for ever.
#[test]
fn a_forked_process_is_refused_the_driver() {
    load();
    let (_context, _stream) = device(0);
    // SAFETY: the child only makes driver calls, which refuse before they take a lock or allocate more than a sentence,
    // and ends without destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let codes = unsafe { [sys::cuInit(0), sys::cuCtxSynchronize()] };
        let refused = codes.iter().all(|&code| code == CUresult::CUDA_ERROR_NOT_INITIALIZED);
        unsafe { libc::_exit(if refused { 7 } else { 1 }) };
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "status {status:#x}");
    // The parent goes on.
    assert_eq!(unsafe { sys::cuCtxSynchronize() }, CUresult::CUDA_SUCCESS);
}
