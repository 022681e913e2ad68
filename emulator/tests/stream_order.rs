//! The check `stream_order`: each pair of accesses that nothing orders is refused, and passes once something does.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a kernel or a call the arguments that it declares; what is missing is missing on purpose"
)]

mod support;

use cudarc::driver::sys::{self, CUresult, CUstream};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, result};
use std::ffi::c_void;
use std::sync::Arc;
use support::{code, kernel, last_message};

const BASIC: &str = include_str!("kernels/basic.ptx");
const COUNT: usize = 1024;
const BYTES: usize = 4 * COUNT;

/// Two streams that do not wait for the legacy stream, and a buffer for x and one for y that nothing has accessed yet
/// but the host, which has waited.
struct Bench {
    context: Arc<CudaContext>,
    a: Arc<CudaStream>,
    b: Arc<CudaStream>,
    fill: CudaFunction,
    copy: CudaFunction,
    x: u64,
    y: u64,
}

type Done = Result<(), DriverError>;

fn bench() -> Bench {
    support::load(&[]);
    let (context, a) = support::device(0);
    let b = context.new_stream().unwrap();
    let (fill, copy) = (kernel(&context, BASIC, "fill"), kernel(&context, BASIC, "copy"));
    let [x, y] = [(); 2].map(|()| unsafe { result::malloc_sync(BYTES) }.unwrap());
    for address in [x, y] {
        unsafe { result::memset_d8_sync(address, 0, BYTES) }.unwrap();
    }
    Bench { context, a, b, fill, copy, x, y }
}

impl Bench {
    /// A kernel that writes v to `count` numbers.
    fn fill(&self, stream: CUstream, to: u64, count: usize) -> Done {
        let (mut to, mut v, mut n) = (to, 1.0f32, count as i32);
        self.launch(&self.fill, stream, count, &mut [(&raw mut to).cast(), (&raw mut v).cast(), (&raw mut n).cast()])
    }

    /// A kernel that copies `count` numbers.
    fn copy(&self, stream: CUstream, from: u64, to: u64, count: usize) -> Done {
        let (mut from, mut to, mut n) = (from, to, count as i32);
        let params = &mut [(&raw mut from).cast(), (&raw mut to).cast(), (&raw mut n).cast()];
        self.launch(&self.copy, stream, count, params)
    }

    fn launch(&self, kernel: &CudaFunction, stream: CUstream, count: usize, params: &mut [*mut c_void]) -> Done {
        let function = kernel.cu_function();
        let blocks = count.div_ceil(128) as u32;
        unsafe { result::launch_kernel(function, (blocks, 1, 1), (128, 1, 1), 0, stream, params) }
    }

    /// A copy from pageable host memory.
    fn upload(&self, stream: CUstream, to: u64, bytes: usize) -> Done {
        unsafe { result::memcpy_htod_async(to, &vec![7u8; bytes], stream) }
    }

    fn a(&self) -> CUstream {
        self.a.cu_stream()
    }

    fn b(&self) -> CUstream {
        self.b.cu_stream()
    }
}

const LEGACY: CUstream = std::ptr::null_mut();

fn refused(what: Done, words: &[&str]) {
    assert_eq!(code(what), CUresult::CUDA_ERROR_LAUNCH_FAILED, "{words:?}");
    let message = last_message();
    for word in words.iter().chain(&["nothing orders the two"]) {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

#[test]
fn a_kernel_waits_for_a_copy_on_another_stream() {
    let bench = bench();
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    let streams = [bench.a(), bench.b()].map(|stream| format!("non-blocking stream {stream:p}"));
    let bytes = format!("copy {BYTES}x1x1 on {} has written", streams[0]);
    refused(
        bench.copy(bench.b(), bench.x, bench.y, COUNT),
        &[&format!("kernel copy on {} reads", streams[1]), &bytes, "byte 0 of allocation", "which has 4096"],
    );
    // As after any fault.
    assert_eq!(code(bench.upload(bench.a(), bench.x, 4)), CUresult::CUDA_ERROR_LAUNCH_FAILED);

    let bench = self::bench();
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    bench.b.wait(&bench.a.record_event(None).unwrap()).unwrap();
    bench.copy(bench.b(), bench.x, bench.y, COUNT).unwrap();
}

#[test]
fn an_event_stands_for_what_came_before_its_last_record() {
    let bench = bench();
    let event = bench.a.record_event(None).unwrap();
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    bench.b.wait(&event).unwrap();
    refused(bench.fill(bench.b(), bench.x, COUNT), &["kernel fill", "writes", "has written"]);

    let bench = self::bench();
    let event = bench.a.record_event(None).unwrap();
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    event.record(&bench.a).unwrap();
    bench.b.wait(&event).unwrap();
    bench.fill(bench.b(), bench.x, COUNT).unwrap();
    // What a third stream learns through the second.
    let c = bench.context.new_stream().unwrap();
    c.wait(&bench.b.record_event(None).unwrap()).unwrap();
    bench.upload(c.cu_stream(), bench.x, BYTES).unwrap();
}

/// Two buffers in turn, as an upload that overlaps with kernels has them.
#[test]
fn a_buffer_is_written_again_once_it_has_been_read() {
    for waits in [false, true] {
        let bench = bench();
        let (copied, moved) = (bench.context.new_event(None).unwrap(), bench.context.new_event(None).unwrap());
        for step in 0..3 {
            if waits {
                bench.a.wait(&moved).unwrap();
            }
            let upload = bench.upload(bench.a(), bench.x, BYTES);
            if !waits && step == 1 {
                refused(upload, &["copy 4096x1x1", "writes", "kernel copy", "has read"]);
                break;
            }
            upload.unwrap();
            copied.record(&bench.a).unwrap();
            bench.b.wait(&copied).unwrap();
            bench.copy(bench.b(), bench.x, bench.y, COUNT).unwrap();
            moved.record(&bench.b).unwrap();
        }
    }
}

#[test]
fn only_accesses_that_meet_conflict() {
    let bench = bench();
    // Halves, of which the second does not begin with a sector; kernels share the sector between them.
    let half = COUNT / 2 + 3;
    let second = bench.x + 4 * half as u64;
    bench.fill(bench.a(), bench.x, half).unwrap();
    bench.fill(bench.b(), second, COUNT - half).unwrap();
    bench.upload(bench.a(), bench.x, 4 * half).unwrap();
    bench.upload(bench.b(), second, BYTES - 4 * half).unwrap();
    // Reads of one memory.
    bench.copy(bench.a(), bench.y, bench.x, half).unwrap();
    bench.copy(bench.b(), bench.y, second, COUNT - half).unwrap();
    // Columns of a matrix: rows of 24 bytes in a pitch of 64.
    let columns = |stream, x: u64| unsafe { sys::cuMemsetD2D8Async(bench.y + x, 64, 1, 24, 64, stream) }.result();
    bench.context.synchronize().unwrap();
    columns(bench.a(), 0).unwrap();
    columns(bench.b(), 24).unwrap();
    refused(columns(bench.b(), 8), &["fill 24x64", "byte 8 of"]);
}

/// An allocation smaller than a sector has no other bytes that a kernel could have meant.
#[test]
fn a_number_alone_counts() {
    let bench = bench();
    let number = unsafe { result::malloc_sync(4) }.unwrap();
    bench.upload(bench.a(), number, 4).unwrap();
    refused(bench.fill(bench.b(), number, 1), &["kernel fill", "copy 4x1x1"]);

    let bench = self::bench();
    let number = unsafe { result::malloc_sync(4) }.unwrap();
    bench.fill(bench.a(), number, 1).unwrap();
    refused(bench.fill(bench.b(), number, 1), &["kernel fill", "writes", "has written"]);
}

#[test]
fn the_host_passes_on_what_it_waited_for() {
    let passes = |wait: &dyn Fn(&Bench)| {
        let bench = bench();
        bench.upload(bench.a(), bench.x, BYTES).unwrap();
        wait(&bench);
        bench.fill(bench.b(), bench.x, COUNT)
    };
    passes(&|bench| bench.a.synchronize().unwrap()).unwrap();
    passes(&|bench| bench.context.synchronize().unwrap()).unwrap();
    passes(&|bench| bench.a.record_event(None).unwrap().synchronize().unwrap()).unwrap();
    passes(&|bench| assert!(bench.a.record_event(None).unwrap().is_complete())).unwrap();
    passes(&|bench| unsafe { sys::cuStreamQuery(bench.a()) }.result().unwrap()).unwrap();
    // Returns when it is done, as a copy to pageable memory does.
    passes(&|bench| unsafe { result::memcpy_dtoh_async(&mut [0u8; 4], bench.y, bench.a()) }.unwrap()).unwrap();
    // Another thread waited.
    passes(&|bench| std::thread::scope(|scope| drop(scope.spawn(|| bench.a.synchronize().unwrap()).join()))).unwrap();
    // The wrong stream, and an event of it.
    refused(passes(&|bench| bench.b.synchronize().unwrap()), &["kernel fill"]);
    refused(passes(&|bench| bench.b.record_event(None).unwrap().synchronize().unwrap()), &["kernel fill"]);
    refused(passes(&|bench| drop(bench.a.record_event(None).unwrap())), &["kernel fill"]);
    // A copy that returns earlier.
    refused(
        passes(&|bench| unsafe {
            let mut pinned = std::ptr::null_mut();
            sys::cuMemAllocHost_v2(&mut pinned, 4).result().unwrap();
            sys::cuMemcpyDtoHAsync_v2(pinned, bench.y, 4, bench.a()).result().unwrap();
        }),
        &["kernel fill"],
    );
}

#[test]
fn the_legacy_stream_and_blocking_streams_wait_for_each_other() {
    let blocking = || {
        let mut stream = std::ptr::null_mut();
        unsafe { sys::cuStreamCreate(&mut stream, 0) }.result().unwrap();
        stream
    };
    let per_thread = || 2 as CUstream;
    for stream in [&blocking as &dyn Fn() -> CUstream, &per_thread] {
        let bench = bench();
        let stream = stream();
        bench.upload(stream, bench.x, BYTES).unwrap();
        bench.copy(LEGACY, bench.x, bench.y, COUNT).unwrap();
        bench.upload(stream, bench.x, BYTES).unwrap();
        // Two streams, by way of the legacy stream.
        bench.fill(LEGACY, bench.y, 1).unwrap();
        bench.fill(blocking(), bench.x, COUNT).unwrap();
        refused(bench.fill(stream, bench.x, COUNT), &["kernel fill", "has written"]);
    }
    let bench = bench();
    bench.upload(LEGACY, bench.x, BYTES).unwrap();
    refused(bench.copy(bench.a(), bench.x, bench.y, COUNT), &["non-blocking stream", "on the legacy stream"]);
    let bench = self::bench();
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    refused(bench.copy(LEGACY, bench.x, bench.y, COUNT), &["on the legacy stream", "non-blocking stream"]);
    // Synchronous calls on it have been waited for, but have not waited for other streams.
    let bench = self::bench();
    unsafe { result::memcpy_htod_sync(bench.x, &[1u8; BYTES]) }.unwrap();
    bench.fill(bench.a(), bench.x, COUNT).unwrap();
    let mut host = [0u8; 32];
    refused(unsafe { result::memcpy_dtoh_sync(&mut host, bench.x) }, &["copy 32x1x1 on the legacy stream reads"]);
}

#[test]
fn a_graph_is_one_item_of_its_stream() {
    let capture = |bench: &Bench| {
        // Another stream takes part; its work is the graph's, and its waits are no waits of its own.
        let side = bench.context.new_stream().unwrap();
        bench.b.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        side.join(&bench.b).unwrap();
        bench.copy(side.cu_stream(), bench.x, bench.y, COUNT).unwrap();
        bench.b.join(&side).unwrap();
        bench.b.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().expect("a graph")
    };
    let bench = bench();
    let graph = capture(&bench);
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    refused(graph.launch(), &["kernel copy", &format!("{:p} reads", bench.b()), "copy 4096x1x1"]);

    let bench = self::bench();
    let graph = capture(&bench);
    for _ in 0..2 {
        bench.upload(bench.a(), bench.x, BYTES).unwrap();
        bench.b.join(&bench.a).unwrap();
        graph.launch().unwrap();
        bench.a.join(&bench.b).unwrap();
    }
    graph.launch().unwrap();
    refused(bench.upload(bench.a(), bench.x, BYTES), &["copy 4096x1x1", "kernel copy", "has read"]);
}

/// A graph comes after its last launch, on whichever stream that was; an external wait is for the event as it is then.
#[test]
fn graphs_wait_for_their_last_launch_and_for_external_events() {
    let capture = |bench: &Bench, event: Option<&cudarc::driver::CudaEvent>| {
        bench.b.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        if let Some(event) = event {
            let external = sys::CUevent_wait_flags::CU_EVENT_WAIT_EXTERNAL;
            unsafe { result::stream::wait_event(bench.b(), event.cu_event(), external) }.unwrap();
        }
        bench.fill(bench.b(), bench.x, COUNT).unwrap();
        bench.b.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().expect("a graph")
    };
    let bench = bench();
    let (graph, other) = (capture(&bench, None), capture(&bench, None));
    let launch =
        |graph: &cudarc::driver::CudaGraph, stream| unsafe { result::graph::launch(graph.cu_graph_exec(), stream) };
    launch(&graph, bench.a()).unwrap();
    launch(&graph, bench.b()).unwrap();
    refused(launch(&other, bench.a()), &["kernel fill"]);

    for waits in [true, false] {
        let bench = self::bench();
        let event = bench.context.new_event(None).unwrap();
        let graph = capture(&bench, waits.then_some(&event));
        bench.upload(bench.a(), bench.x, BYTES).unwrap();
        event.record(&bench.a).unwrap();
        match waits {
            true => graph.launch().unwrap(),
            false => refused(graph.launch(), &["kernel fill", "copy 4096x1x1"]),
        }
    }
}

/// Atomics of two streams on one number are made to meet; what is plain is not.
#[test]
fn atomics_conflict_with_plain_accesses_only() {
    let bench = bench();
    let one = kernel(&bench.context, include_str!("kernels/control.ptx"), "one_atomic");
    let atomic = |stream| bench.launch(&one, stream, 1, &mut [(&raw const bench.x).cast_mut().cast()]);
    atomic(bench.a()).unwrap();
    atomic(bench.b()).unwrap();
    refused(bench.upload(bench.b(), bench.x, BYTES), &["copy 4096x1x1", "kernel one_atomic", "has written"]);
}

#[test]
fn a_host_function_knows_what_came_before_it() {
    unsafe extern "C" fn nothing(_: *mut c_void) {}
    for calls in [false, true] {
        let bench = bench();
        bench.upload(bench.a(), bench.x, BYTES).unwrap();
        if calls {
            let null = std::ptr::null_mut();
            unsafe { sys::cuLaunchHostFunc(bench.a(), Some(nothing), null) }.result().unwrap();
        }
        let filled = bench.fill(bench.b(), bench.x, COUNT);
        match calls {
            true => filled.unwrap(),
            false => refused(filled, &["kernel fill", "copy 4096x1x1", "has written"]),
        }
    }
}

#[test]
fn memory_is_allocated_in_stream_order() {
    for waits in [false, true] {
        let bench = bench();
        let address = unsafe { result::malloc_async(bench.a(), BYTES) }.unwrap();
        if waits {
            bench.b.join(&bench.a).unwrap();
        }
        let copied = bench.upload(bench.b(), address, BYTES);
        match waits {
            true => copied.unwrap(),
            false => refused(copied, &["copy 4096x1x1", "cuMemAllocAsync", "has written"]),
        }
    }
}

#[test]
fn memory_is_freed_in_stream_order() {
    for waits in [false, true] {
        let bench = bench();
        let address = unsafe { result::malloc_async(bench.a(), BYTES) }.unwrap();
        bench.b.join(&bench.a).unwrap();
        bench.fill(bench.b(), address, COUNT).unwrap();
        if waits {
            bench.a.join(&bench.b).unwrap();
        }
        let freed = unsafe { result::free_async(address, bench.a()) };
        if !waits {
            refused(freed, &["cuMemFreeAsync", "kernel fill", "has written"]);
            continue;
        }
        freed.unwrap();
        // Another allocation, even at the same address, has a history of its own.
        let next = unsafe { result::malloc_async(bench.b(), BYTES) }.unwrap();
        bench.fill(bench.b(), next, COUNT).unwrap();
    }
}

#[test]
fn the_check_can_be_switched_off() {
    let bench = bench();
    support::configure(
        "checks",
        "bounds,uninitialised,shared_races,barrier_divergence,inactive_shuffle,global_races,leaks",
    );
    bench.upload(bench.a(), bench.x, BYTES).unwrap();
    bench.fill(bench.b(), bench.x, COUNT).unwrap();
    support::configure("checks", "all");
    // What was not recorded is not reported.
    bench.fill(bench.b(), bench.x, COUNT).unwrap();
    refused(bench.upload(bench.a(), bench.x, BYTES), &["copy 4096x1x1", "kernel fill"]);
}
