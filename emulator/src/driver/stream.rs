//! Streams.
//!
//! Work runs inside the call that submits it, so a stream is never behind. What a stream adds is ordering between host
//! threads (its own lock, and the legacy stream's rule), capture, and the refusals of a real driver. Host functions are
//! the exception: they run on a thread of their own, and the stream's next work waits for them.
//!
//! Not here: copies and kernels that overlap. What a program forgets to order between streams is found by
//! [`super::order`]; if it forgets to synchronise before it reads pinned memory, it is not caught.

use super::call::{Answer, exports, give, give_if_asked, refuse};
use super::codes::Code;
use super::graph::{self, Mode};
use super::handles;
use super::order;
use super::settings;
use super::state::{self, Context, Handle, current, driver};
use super::work::{HostFunction, Work};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The NULL stream: its work and that of every blocking stream are serialised.
    Legacy,
    /// A host thread's own default stream.
    PerThread,
    Blocking,
    NonBlocking,
}

pub struct Stream {
    pub handle: usize,
    pub context: usize,
    pub role: Role,
    pub priority: c_int,
    /// Held while the stream works.
    busy: Mutex<()>,
    /// Host functions in progress.
    host_functions: Mutex<Vec<JoinHandle<()>>>,
}

const LEAST_PRIORITY: c_int = 0;
const GREATEST_PRIORITY: c_int = -5;
const NON_BLOCKING: c_uint = 1;

impl Stream {
    pub fn new(context: usize, role: Role) -> Stream {
        Stream {
            handle: handles::fresh(),
            context,
            role,
            priority: 0,
            busy: Mutex::new(()),
            host_functions: Mutex::default(),
        }
    }

    /// Whether the legacy stream synchronises with this one.
    pub fn is_blocking(&self) -> bool {
        self.role != Role::NonBlocking
    }

    /// Waits for everything submitted to the stream.
    pub fn settle(&self) {
        let _turn = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.join_host_functions();
    }

    fn join_host_functions(&self) {
        let threads = std::mem::take(&mut *self.host_functions.lock().unwrap());
        for thread in threads {
            // A host function that panicked has printed why; the stream goes on, as after any C callback.
            let _ = thread.join();
        }
    }

    /// Whether everything submitted is done.
    fn is_idle(&self) -> bool {
        let functions = self.host_functions.lock().unwrap();
        functions.iter().all(JoinHandle::is_finished) && self.busy.try_lock().is_ok()
    }

    /// Runs `work` in the stream's order, on this thread.
    pub fn run(self: &Arc<Self>, context: &Context, work: &Work) -> Answer {
        context.check()?;
        let run = settings::of_this_thread(&driver()?.settings.run);
        let (_alone, _among_others);
        match self.role {
            Role::Legacy => {
                _alone = context.order.write().unwrap_or_else(PoisonError::into_inner);
                for stream in driver()?.streams.all() {
                    if stream.context == context.handle && stream.is_blocking() {
                        stream.join_host_functions();
                    }
                }
            }
            Role::Blocking | Role::PerThread => {
                _among_others = context.order.read().unwrap_or_else(PoisonError::into_inner);
                context.legacy.join_host_functions();
            }
            Role::NonBlocking => (),
        }
        let _turn = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.join_host_functions();
        order::begin(self)?;
        match work {
            Work::Host(function) => self.start_host_function(*function),
            Work::Copy(copy) => {
                work.run(context, self, &run)?;
                if copy.is_waited_for()? { order::host_waited(self) } else { Ok(()) }
            }
            _ => work.run(context, self, &run),
        }
    }

    fn start_host_function(&self, function: HostFunction) -> Answer {
        // The function may tell a thread that submits work elsewhere.
        order::host_waited(self)?;
        let thread = std::thread::spawn(move || function.call());
        self.host_functions.lock().unwrap().push(thread);
        Ok(())
    }
}

/// The stream that a handle means, with its context: 0 and 1 are the legacy stream of the current context, 2 is this
/// thread's default stream.
pub fn resolve(handle: Handle) -> Answer<(Arc<Context>, Arc<Stream>)> {
    match handle as usize {
        0 | 1 => {
            let context = current()?;
            let stream = context.legacy.clone();
            Ok((context, stream))
        }
        2 => {
            let context = current()?;
            let stream = context.of_this_thread();
            Ok((context, stream))
        }
        _ => {
            let driver = driver()?;
            let stream = driver.streams.get(handle)?;
            let context = driver.contexts.get(stream.context as Handle)?;
            context.check()?;
            Ok((context, stream))
        }
    }
}

/// Captures `work` where the stream is capturing, runs it otherwise.
pub fn submit(handle: Handle, work: Work) -> Answer {
    let (context, stream) = resolve(handle)?;
    match graph::capture(&stream, work)? {
        None => Ok(()),
        Some(work) => stream.run(&context, &work),
    }
}

/// Runs work synchronously on the legacy stream, as synchronous copies and fills do.
pub fn run_synchronously(work: Work) -> Answer {
    let context = current()?;
    graph::refuse_implicit_use(&context.legacy)?;
    graph::refuse_unsafe_call()?;
    context.legacy.run(&context, &work)?;
    order::host_waited(&context.legacy)
}

/// Waits for every stream of a context.
pub fn settle_all(context: &Context) -> Answer {
    drop(context.order.write().unwrap_or_else(PoisonError::into_inner));
    context.legacy.settle();
    for stream in driver()?.streams.all() {
        if stream.context == context.handle {
            stream.settle();
        }
    }
    Ok(())
}

/// The capture mode that a number stands for, as host threads set it for themselves.
fn mode_from(number: c_int) -> Answer<Mode> {
    match number {
        0 => Ok(Mode::Global),
        1 => Ok(Mode::ThreadLocal),
        2 => Ok(Mode::Relaxed),
        _ => refuse(
            Code::INVALID_VALUE,
            format!("the capture mode must be 0 (global), 1 (thread-local) or 2 (relaxed), not {number}"),
        ),
    }
}

fn create(flags: c_uint, priority: c_int) -> Answer<Handle> {
    let context = current()?;
    let role = match flags {
        0 => Role::Blocking,
        NON_BLOCKING => Role::NonBlocking,
        _ => {
            return refuse(Code::INVALID_VALUE, format!("stream flags must be 0 or 1 (non-blocking), not {flags:#x}"));
        }
    };
    let mut stream = Stream::new(context.handle, role);
    stream.priority = priority.clamp(GREATEST_PRIORITY, LEAST_PRIORITY);
    Ok(driver()?.streams.insert(stream.handle, Arc::new(stream)))
}

type StreamCallback = unsafe extern "C" fn(Handle, Code, *mut c_void);

exports! { STREAM:
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) {
        give(stream, create(flags, 0)?, "the stream")
    }

    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) {
        give(stream, create(flags, priority)?, "the stream")
    }

    fn cuStreamDestroy(stream: Handle) {
        destroy(stream)
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        destroy(stream)
    }

    fn cuStreamSynchronize(stream: Handle) {
        let (context, stream) = resolve(stream)?;
        graph::refuse_while_capturing(&stream, "cuStreamSynchronize")?;
        graph::refuse_implicit_use(&stream)?;
        graph::refuse_unsafe_call()?;
        if stream.role == Role::Legacy {
            settle_all(&context)?;
        } else {
            stream.settle();
        }
        order::host_waited(&stream)?;
        context.check()?;
        super::pool::trim_at_synchronisation(context.device()?);
        Ok(())
    }

    fn cuStreamQuery(stream: Handle) {
        let (_, stream) = resolve(stream)?;
        graph::refuse_while_capturing(&stream, "cuStreamQuery")?;
        graph::refuse_implicit_use(&stream)?;
        graph::refuse_unsafe_call()?;
        if stream.is_idle() {
            order::host_waited(&stream)
        } else {
            refuse(Code::NOT_READY, "the stream has work left")
        }
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) {
        let (_, stream) = resolve(stream)?;
        let event = driver()?.events.get(event)?;
        graph::wait_for_event(&stream, &event, flags)
    }

    fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) {
        give(priority, resolve(stream)?.1.priority, "the priority")
    }

    fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) {
        let non_blocking = resolve(stream)?.1.role == Role::NonBlocking;
        give(flags, c_uint::from(non_blocking), "the flags")
    }

    fn cuStreamGetId(stream: Handle, id: *mut u64) {
        give(id, resolve(stream)?.1.handle as u64, "the id")
    }

    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) {
        give(context, resolve(stream)?.0.handle as Handle, "the context")
    }

    fn cuStreamGetDevice(stream: Handle, device: *mut c_int) {
        give(device, resolve(stream)?.0.device, "the device")
    }

    fn cuStreamAttachMemAsync(stream: Handle, address: u64, length: usize, flags: c_uint) {
        let (_, stream) = resolve(stream)?;
        graph::refuse_while_capturing(&stream, "cuStreamAttachMemAsync")?;
        let _ = length;
        if !matches!(flags, 1 | 2 | 4) {
            let why = format!("the attachment must be 1 (global), 2 (host) or 4 (single), not {flags}");
            return refuse(Code::INVALID_VALUE, why);
        }
        match state::device_of(address) {
            Some((_, first, owned)) if first == address && matches!(owned.kind, state::Kind::Managed) => Ok(()),
            _ => refuse(Code::INVALID_VALUE, format!("{address:#x} is not the start of managed memory")),
        }
    }

    fn cuStreamAddCallback(stream: Handle, callback: Option<StreamCallback>, data: *mut c_void, flags: c_uint) {
        let Some(callback) = callback else {
            return refuse(Code::INVALID_VALUE, "the callback is null");
        };
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        let target = resolve(stream)?.1;
        graph::refuse_while_capturing(&target, "cuStreamAddCallback")?;
        submit(stream, Work::Host(HostFunction::Callback { callback, stream: stream as usize, data: data as usize }))
    }

    fn cuLaunchHostFunc(stream: Handle, function: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) {
        let Some(function) = function else {
            return refuse(Code::INVALID_VALUE, "the function is null");
        };
        submit(stream, Work::Host(HostFunction::Plain { function, data: data as usize }))
    }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        current()?;
        give_if_asked(least, LEAST_PRIORITY);
        give_if_asked(greatest, GREATEST_PRIORITY);
        Ok(())
    }

    fn cuStreamBeginCapture(stream: Handle) {
        graph::begin(&resolve(stream)?.1, Mode::Global)
    }

    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int) {
        graph::begin(&resolve(stream)?.1, mode_from(mode)?)
    }

    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        give(graph, std::ptr::null_mut(), "the graph")?;
        let captured = graph::end(&resolve(stream)?.1)?;
        give(graph, captured, "the graph")
    }

    fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) {
        let (_, stream) = resolve(stream)?;
        graph::refuse_to_tell_of_implicit_use(&stream)?;
        give(status, graph::status(&stream)?.0, "the status")
    }

    fn cuStreamGetCaptureInfo(stream: Handle, status: *mut c_int, id: *mut u64) {
        capture_info(stream, status, id)
    }

    fn cuStreamGetCaptureInfo_v2(
        stream: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        count: *mut usize,
    ) {
        capture_info(stream, status, id)?;
        open_graph(stream, graph, dependencies, count)
    }

    fn cuStreamGetCaptureInfo_v3(
        stream: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        edges: *mut *const c_void, count: *mut usize,
    ) {
        give_if_asked(edges, std::ptr::null());
        capture_info(stream, status, id)?;
        open_graph(stream, graph, dependencies, count)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) {
        driver()?;
        if mode.is_null() {
            return refuse(Code::INVALID_VALUE, "the pointer for the mode is null");
        }
        let former = graph::exchange_thread_mode(mode_from(*mode)?);
        give(mode, former as c_int, "the mode")
    }
}

fn destroy(handle: Handle) -> Answer {
    if handle as usize <= 2 {
        return refuse(Code::INVALID_HANDLE, "a default stream cannot be destroyed");
    }
    let stream = driver()?.streams.remove(handle)?;
    graph::forget_stream(&stream);
    stream.settle();
    order::forget_stream(&stream)
}

/// # Safety
/// As the exported functions: pointers are null or valid for writes.
unsafe fn capture_info(stream: Handle, status: *mut c_int, id: *mut u64) -> Answer {
    let (_, stream) = resolve(stream)?;
    graph::refuse_to_tell_of_implicit_use(&stream)?;
    let (now, sequence) = graph::status(&stream)?;
    // SAFETY: guaranteed by the caller.
    unsafe {
        give_if_asked(id, sequence);
        give(status, now, "the status")
    }
}

/// # Safety
/// As the exported functions: pointers are null or valid for writes.
unsafe fn open_graph(
    stream: Handle,
    graph: *mut Handle,
    dependencies: *mut *const Handle,
    count: *mut usize,
) -> Answer {
    let (_, stream) = resolve(stream)?;
    let (open, nodes, number) = graph::under_capture(&stream)?;
    // SAFETY: guaranteed by the caller.
    unsafe {
        give_if_asked(graph, open);
        give_if_asked(dependencies, nodes);
        give_if_asked(count, number);
    }
    Ok(())
}

impl Context {
    /// This host thread's default stream in the context.
    pub fn of_this_thread(&self) -> Arc<Stream> {
        let mut streams = self.per_thread.lock().unwrap();
        streams
            .entry(std::thread::current().id())
            .or_insert_with(|| Arc::new(Stream::new(self.handle, Role::PerThread)))
            .clone()
    }
}
