//! Stream capture and graphs.
//!
//! A capture sequence keeps its nodes in the order of submission and, for every participating stream, the nodes that
//! the stream's next work depends on. The rules are those of the programming guide:
//!
//! - an event recorded in the sequence carries its nodes to a stream that waits for it, which thereby joins the
//!   sequence;
//! - a dependency on work outside is refused (905), as is merging two sequences (902);
//! - while a blocking stream captures, the legacy stream cannot be used (906);
//! - synchronising with, or querying, a capturing stream or a captured event is refused (900, 907);
//! - calls that may synchronise or allocate are refused (900) in the threads that the capture mode protects;
//! - breaking a rule also invalidates the sequence, which the end of the capture reports (901).
//!
//! A graph's nodes run in an order that its edges allow: the order of capture or, with a schedule seed, a random one,
//! so that a missing edge shows. Graphs built node by node (`cuGraphAdd...`) are not emulated.

use super::call::{Answer, Refusal, exports, give, give_if_asked, refuse};
use super::codes::Code;
use super::event::{self, EXTERNAL, Event, State};
use super::handles;
use super::order::{self, Clock};
use super::settings::Run;
use super::state::{Context, DevicePointer, Handle, current, driver};
use super::stream::{self, Role, Stream};
use super::user_object::Objects;
use super::work::Work;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_char, c_int, c_uint};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;

/// How a capture, or a thread, treats calls that are unsafe during capture.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Global = 0,
    ThreadLocal = 1,
    Relaxed = 2,
}

/// A capture sequence under way.
pub struct Capture {
    context: usize,
    /// Handle of the stream on which the capture began.
    origin: usize,
    mode: Mode,
    thread: ThreadId,
    nodes: Vec<Step>,
    /// Handle of the graph that the sequence becomes, and the user objects it holds.
    graph: usize,
    objects: Objects,
    /// Handles of the nodes.
    node_handles: Vec<usize>,
    /// The dependencies last reported to the program, which may read them until its next call for the stream.
    told: Vec<usize>,
    /// For each participating stream: whether it is blocking, and the nodes that its next work depends on.
    members: BTreeMap<usize, Member>,
    /// Why the sequence can no longer become a graph.
    invalid: Option<String>,
}

struct Member {
    blocking: bool,
    heads: BTreeSet<usize>,
}

/// One node: its work and its dependencies.
#[derive(Clone)]
pub struct Step {
    work: Arc<Work>,
    after: Vec<usize>,
}

pub struct Graph {
    handle: usize,
    pub context: usize,
    steps: Vec<Step>,
    /// Handles of the nodes, created when a program asks for them.
    handles: OnceLock<Vec<usize>>,
    objects: Objects,
}

/// A node of a graph as a program sees it.
pub struct Node {
    graph: usize,
    kind: c_int,
    after: Vec<usize>,
}

/// An instantiated graph.
pub struct GraphExec {
    pub context: usize,
    steps: Vec<Step>,
    flags: u64,
    /// Launches so far: with a seed, each gets its own order.
    launches: AtomicU64,
    /// One launch of an executable graph at a time, as the manual says, each after the last, which came after this.
    busy: Mutex<Clock>,
    /// User objects, held as long as this lives.
    _objects: Objects,
}

/// Memory allocated by a node of a graph. The address is the same in every launch, and reserved as long as a graph
/// needs it.
pub struct GraphMemory {
    pub device: c_int,
    pub address: DevicePointer,
    pub bytes: u64,
    /// Allocated and not yet freed.
    pub live: AtomicBool,
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        if let Ok(device) = super::state::device(self.device) {
            let known = device.allocations.lock().unwrap().remove(&self.address);
            if known.is_some() {
                // Nothing is left to do where the memory does not know the address any more.
                let _ = device.memory.free(self.address);
            }
        }
    }
}

static NEXT_SEQUENCE: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static THREAD_MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

pub fn exchange_thread_mode(mode: Mode) -> Mode {
    THREAD_MODE.replace(mode)
}

const STATUS_NONE: c_int = 0;
const STATUS_ACTIVE: c_int = 1;
const STATUS_INVALIDATED: c_int = 2;

const AUTO_FREE_ON_LAUNCH: u64 = 1;
const UPLOAD: u64 = 2;
const DEVICE_LAUNCH: u64 = 4;
const USE_NODE_PRIORITY: u64 = 8;

impl Capture {
    fn append(&mut self, stream: &Stream, work: Work) {
        let node = self.nodes.len();
        let member = self.members.get_mut(&stream.handle);
        let heads = &mut member.expect("a stream that takes part").heads;
        self.nodes.push(Step { work: Arc::new(work), after: heads.iter().copied().collect() });
        self.node_handles.push(handles::fresh());
        *heads = BTreeSet::from([node]);
    }

    fn check(&self) -> Answer {
        match &self.invalid {
            None => Ok(()),
            Some(why) => refuse(Code::STREAM_CAPTURE_INVALIDATED, format!("the capture was invalidated: {why}")),
        }
    }

    fn has_blocking_member(&self) -> bool {
        self.members.values().any(|member| member.blocking)
    }

    /// Whether all nodes come before the origin's next work.
    fn is_joined(&self) -> bool {
        let mut seen = vec![false; self.nodes.len()];
        let mut open: Vec<usize> = self.members[&self.origin].heads.iter().copied().collect();
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut seen[node], true) {
                open.extend(&self.nodes[node].after);
            }
        }
        seen.iter().all(|&seen| seen)
    }
}

fn of_stream<'a>(captures: &'a mut BTreeMap<u64, Capture>, stream: &Stream) -> Option<(u64, &'a mut Capture)> {
    captures
        .iter_mut()
        .find(|(_, capture)| capture.members.contains_key(&stream.handle))
        .map(|(&sequence, capture)| (sequence, capture))
}

pub fn begin(stream: &Stream, mode: Mode) -> Answer {
    if stream.role == Role::Legacy {
        return refuse(Code::STREAM_CAPTURE_UNSUPPORTED, "the legacy stream cannot capture: use a stream of your own");
    }
    let mut captures = driver()?.captures.lock().unwrap();
    if of_stream(&mut captures, stream).is_some() {
        return refuse(Code::ILLEGAL_STATE, "the stream is capturing already");
    }
    let origin = Member { blocking: stream.is_blocking(), heads: BTreeSet::new() };
    captures.insert(
        NEXT_SEQUENCE.fetch_add(1, Ordering::Relaxed),
        Capture {
            context: stream.context,
            origin: stream.handle,
            mode,
            thread: std::thread::current().id(),
            nodes: Vec::new(),
            graph: handles::fresh(),
            objects: Objects::default(),
            node_handles: Vec::new(),
            told: Vec::new(),
            members: BTreeMap::from([(stream.handle, origin)]),
            invalid: None,
        },
    );
    Ok(())
}

pub fn end(stream: &Stream) -> Answer<Handle> {
    let driver = driver()?;
    let mut captures = driver.captures.lock().unwrap();
    let Some((sequence, capture)) = of_stream(&mut captures, stream) else {
        return refuse(Code::ILLEGAL_STATE, "the stream is not capturing");
    };
    if capture.origin != stream.handle {
        capture.invalid = Some("its end was asked for on a stream that only joined it".into());
        return refuse(Code::STREAM_CAPTURE_UNMATCHED, "the capture began on another stream, where it must end");
    }
    if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
        return refuse(
            Code::STREAM_CAPTURE_WRONG_THREAD,
            "the capture began on another host thread, where it must end unless its mode is relaxed",
        );
    }
    let capture = captures.remove(&sequence).expect("found above");
    capture.check()?;
    if !capture.is_joined() {
        return refuse(
            Code::STREAM_CAPTURE_UNJOINED,
            "work captured on another stream was not joined: record an event there and wait for it on the stream where \
             the capture began",
        );
    }
    let graph = Graph {
        handle: capture.graph,
        context: capture.context,
        steps: capture.nodes,
        handles: OnceLock::from(capture.node_handles),
        objects: capture.objects,
    };
    graph.show_nodes()?;
    Ok(driver.graphs.insert(graph.handle, Arc::new(graph)))
}

/// The graph that the stream's capture builds and the nodes that its next work depends on; None outside a capture.
///
/// The graph is usable once the capture has ended; until then its handle is only an identity.
pub fn under_capture(stream: &Stream) -> Answer<(Handle, *const Handle, usize)> {
    let mut captures = driver()?.captures.lock().unwrap();
    let Some((_, capture)) = of_stream(&mut captures, stream) else {
        return Ok((std::ptr::null_mut(), std::ptr::null(), 0));
    };
    let heads = &capture.members[&stream.handle].heads;
    capture.told = heads.iter().map(|&node| capture.node_handles[node]).collect();
    Ok((capture.graph as Handle, capture.told.as_ptr().cast(), capture.told.len()))
}

/// Accesses the user objects of a graph, even one still under capture.
pub fn with_objects(graph: Handle, what: impl FnOnce(&Objects) -> Answer) -> Answer {
    let driver = driver()?;
    let captures = driver.captures.lock().unwrap();
    match captures.values().find(|capture| capture.graph == graph as usize) {
        Some(capture) => what(&capture.objects),
        None => what(&driver.graphs.get(graph)?.objects),
    }
}

/// (status, sequence id) for the queries.
pub fn status(stream: &Stream) -> Answer<(c_int, u64)> {
    let mut captures = driver()?.captures.lock().unwrap();
    Ok(match of_stream(&mut captures, stream) {
        None => (STATUS_NONE, 0),
        Some((sequence, capture)) if capture.invalid.is_none() => (STATUS_ACTIVE, sequence),
        Some((sequence, _)) => (STATUS_INVALIDATED, sequence),
    })
}

/// Captures `work` if the stream is capturing, else returns it to be run.
pub fn capture(stream: &Stream, work: Work) -> Answer<Option<Work>> {
    let mut captures = driver()?.captures.lock().unwrap();
    if let Some((_, capture)) = of_stream(&mut captures, stream) {
        capture.check()?;
        capture.append(stream, work);
        return Ok(None);
    }
    drop(captures);
    refuse_implicit_use(stream)?;
    Ok(Some(work))
}

/// Whether the stream participates in a capture.
pub fn is_capturing(stream: &Stream) -> Answer<bool> {
    Ok(status(stream)?.0 != STATUS_NONE)
}

/// Refuses a call on a capturing stream that cannot be captured, and invalidates the capture.
pub fn refuse_while_capturing(stream: &Stream, call: &str) -> Answer {
    let mut captures = driver()?.captures.lock().unwrap();
    let Some((_, capture)) = of_stream(&mut captures, stream) else {
        return Ok(());
    };
    let why = format!("{call} was called on a capturing stream");
    capture.invalid.get_or_insert(why.clone());
    refuse(Code::STREAM_CAPTURE_UNSUPPORTED, why)
}

/// Refuses use of the legacy stream while a blocking stream of its context captures, and invalidates that capture.
pub fn refuse_implicit_use(stream: &Stream) -> Answer {
    implicit_use(stream, true)
}

/// As [`refuse_implicit_use`], for queries, which leave the capture as it is.
pub fn refuse_to_tell_of_implicit_use(stream: &Stream) -> Answer {
    implicit_use(stream, false)
}

fn implicit_use(stream: &Stream, invalidates: bool) -> Answer {
    if stream.role != Role::Legacy {
        return Ok(());
    }
    let mut captures = driver()?.captures.lock().unwrap();
    let mut found = false;
    for capture in captures.values_mut() {
        if capture.context == stream.context && capture.has_blocking_member() {
            found = true;
            if invalidates {
                let why = "the legacy stream was used, which waits for every blocking stream";
                capture.invalid.get_or_insert(why.into());
            }
        }
    }
    if !found {
        return Ok(());
    }
    refuse(
        Code::STREAM_CAPTURE_IMPLICIT,
        "the legacy stream would wait for a blocking stream that is capturing: use another stream, or capture on a \
         non-blocking one",
    )
}

/// Refuses a call that may synchronise or allocate where a capture forbids it, and invalidates the capture.
pub fn refuse_unsafe_call() -> Answer {
    let thread_mode = THREAD_MODE.get();
    if thread_mode == Mode::Relaxed {
        return Ok(());
    }
    let this_thread = std::thread::current().id();
    let mut captures = driver()?.captures.lock().unwrap();
    let mut found = false;
    for capture in captures.values_mut() {
        let own = capture.thread == this_thread && capture.mode != Mode::Relaxed;
        if own || (thread_mode == Mode::Global && capture.mode == Mode::Global) {
            found = true;
            let why = "a call was made that may synchronise or allocate";
            capture.invalid.get_or_insert(why.into());
        }
    }
    if !found {
        return Ok(());
    }
    refuse(
        Code::STREAM_CAPTURE_UNSUPPORTED,
        "the call may synchronise or allocate, which the mode of a capture under way forbids",
    )
}

/// Refuses to wait for a whole context in which something captures, and invalidates the captures.
pub fn refuse_context_wait(context: &Context) -> Answer {
    let mut captures = driver()?.captures.lock().unwrap();
    let mut found = false;
    for capture in captures.values_mut() {
        if capture.context == context.handle {
            found = true;
            let why = "the context was synchronised";
            capture.invalid.get_or_insert(why.into());
        }
    }
    if !found {
        return Ok(());
    }
    refuse(
        Code::STREAM_CAPTURE_UNSUPPORTED,
        "a stream of the context is capturing, and what it captures does not run: end the capture before waiting",
    )
}

/// Invalidates a sequence, if it is still under way.
pub fn invalidate(sequence: u64, why: &str) -> Answer {
    if let Some(capture) = driver()?.captures.lock().unwrap().get_mut(&sequence) {
        capture.invalid.get_or_insert(why.into());
    }
    Ok(())
}

/// A stream is destroyed: a capture that began there can no longer end, one that it joined is invalidated.
pub fn forget_stream(stream: &Stream) {
    let Ok(driver) = driver() else { return };
    let mut captures = driver.captures.lock().unwrap();
    captures.retain(|_, capture| capture.origin != stream.handle);
    if let Some((_, capture)) = of_stream(&mut captures, stream) {
        let why = "a stream that takes part was destroyed";
        capture.invalid.get_or_insert(why.into());
    }
}

/// A context is destroyed, and with it the captures of its streams.
pub fn forget_context(context: usize) -> Answer {
    let mut captures = driver()?.captures.lock().unwrap();
    captures.retain(|_, capture| capture.context != context);
    Ok(())
}

/// Records an event on a capturing stream; false if the stream is not capturing.
pub fn record_event(stream: &Stream, event: &Event) -> Answer<bool> {
    let mut captures = driver()?.captures.lock().unwrap();
    let Some((sequence, capture)) = of_stream(&mut captures, stream) else {
        drop(captures);
        refuse_implicit_use(stream)?;
        return Ok(false);
    };
    capture.check()?;
    let heads = &capture.members[&stream.handle].heads;
    event::mark_captured(event, sequence, heads.iter().copied().collect());
    Ok(true)
}

/// `cuStreamWaitEvent`.
pub fn wait_for_event(stream: &Stream, event: &Arc<Event>, flags: c_uint) -> Answer {
    if flags > EXTERNAL {
        return refuse(Code::INVALID_VALUE, format!("the flags must be 0 or 1 (external), not {flags:#x}"));
    }
    refuse_implicit_use(stream)?;
    let mut captures = driver()?.captures.lock().unwrap();
    let own = of_stream(&mut captures, stream).map(|(sequence, _)| sequence);
    if let Some(own) = own {
        captures[&own].check()?;
    }
    if flags == EXTERNAL {
        return match own {
            Some(own) => {
                let capture = captures.get_mut(&own).expect("found above");
                capture.append(stream, Work::Wait(event.clone()));
                Ok(())
            }
            None => refuse(Code::ILLEGAL_STATE, "an external wait only makes sense in a capture"),
        };
    }
    match (own, event::state_of(event)) {
        // Nothing to wait for, or, outside captures, nothing but the order to keep: recorded work is done.
        (_, State::Fresh) => Ok(()),
        (None, State::Recorded { clock, .. }) => order::wait(stream, &clock),
        (Some(own), State::Recorded { .. }) => {
            let capture = captures.get_mut(&own).expect("found above");
            let why = "a capturing stream was made to wait for an event recorded outside the capture";
            capture.invalid.get_or_insert(why.into());
            refuse(Code::STREAM_CAPTURE_ISOLATION, why)
        }
        (own, State::Captured { sequence, after }) => {
            if !captures.contains_key(&sequence) {
                if let Some(capture) = own.and_then(|own| captures.get_mut(&own)) {
                    let why = "a capturing stream was made to wait for an event of an earlier capture";
                    capture.invalid.get_or_insert(why.into());
                    return refuse(Code::STREAM_CAPTURE_ISOLATION, why);
                }
                return refuse(Code::CAPTURED_EVENT, "the event was last recorded in a capture that has ended");
            }
            if let Some(own) = own.filter(|&own| own != sequence) {
                let why = "a wait would have merged two captures";
                for broken in [own, sequence] {
                    let capture = captures.get_mut(&broken).expect("both are under way");
                    capture.invalid.get_or_insert(why.into());
                }
                return refuse(Code::STREAM_CAPTURE_MERGE, why);
            }
            let capture = captures.get_mut(&sequence).expect("checked above");
            capture.check()?;
            if stream.role == Role::Legacy {
                let why = "the legacy stream was made to wait for a captured event";
                capture.invalid.get_or_insert(why.into());
                return refuse(Code::STREAM_CAPTURE_IMPLICIT, why);
            }
            let member = capture
                .members
                .entry(stream.handle)
                .or_insert(Member { blocking: stream.is_blocking(), heads: BTreeSet::new() });
            member.heads.extend(after);
            Ok(())
        }
    }
}

impl GraphExec {
    /// Runs every node once, each after its dependencies.
    pub fn run(&self, context: &Context, stream: &Stream, run: &Run) -> Answer {
        let mut last = self.busy.lock().unwrap_or_else(|broken| broken.into_inner());
        order::wait(stream, &last)?;
        if self.flags & AUTO_FREE_ON_LAUNCH != 0 {
            for step in &self.steps {
                if let Work::Alloc(memory) = &*step.work {
                    memory.live.store(false, Ordering::Relaxed);
                }
            }
        }
        let launch = self.launches.fetch_add(1, Ordering::Relaxed);
        let seed = run.exec.schedule_seed.map(|seed| seed ^ (launch << 32));
        for node in order(&self.steps, seed) {
            self.steps[node].work.run(context, stream, run)?;
        }
        *last = order::now(stream)?;
        Ok(())
    }
}

/// An order of the nodes that the edges allow: the order of capture, or a random one from the seed.
fn order(steps: &[Step], seed: Option<u64>) -> Vec<usize> {
    let Some(mut state) = seed else {
        return (0..steps.len()).collect();
    };
    let mut waiting: Vec<usize> = steps.iter().map(|step| step.after.len()).collect();
    let mut ready: Vec<usize> = (0..steps.len()).filter(|&node| waiting[node] == 0).collect();
    let mut order = Vec::with_capacity(steps.len());
    while !ready.is_empty() {
        // splitmix64; the bias of the remainder is of no consequence for a choice among a few nodes.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let node = ready.swap_remove((bits % ready.len() as u64) as usize);
        order.push(node);
        for (later, step) in steps.iter().enumerate().skip(node + 1) {
            if step.after.contains(&node) {
                waiting[later] -= 1;
                if waiting[later] == 0 {
                    ready.push(later);
                }
            }
        }
    }
    order
}

fn instantiate(graph: Handle, flags: u64) -> Answer<Handle> {
    let driver = driver()?;
    let graph = driver.graphs.get(graph)?;
    let known = AUTO_FREE_ON_LAUNCH | UPLOAD | DEVICE_LAUNCH | USE_NODE_PRIORITY;
    if flags & !known != 0 {
        return refuse(Code::INVALID_VALUE, format!("instantiation flags {flags:#x} are not known"));
    }
    if flags & DEVICE_LAUNCH != 0 && flags & AUTO_FREE_ON_LAUNCH != 0 {
        return refuse(Code::INVALID_VALUE, "a graph for device launch cannot free its memory on launch");
    }
    if flags & DEVICE_LAUNCH != 0 {
        return refuse(Code::NOT_SUPPORTED, "graphs launched from device code are not emulated");
    }
    let exec = GraphExec {
        context: graph.context,
        steps: graph.steps.clone(),
        flags,
        launches: AtomicU64::new(0),
        busy: Mutex::default(),
        _objects: graph.objects.clone(),
    };
    Ok(driver.execs.insert(handles::fresh(), Arc::new(exec)))
}

/// CUDA_GRAPH_INSTANTIATE_PARAMS. The result is 0, or 1 for an error.
#[repr(C)]
pub struct InstantiateParams {
    flags: u64,
    upload_stream: Handle,
    error_node: Handle,
    result: c_int,
}

impl Graph {
    /// Registers the handles of its nodes.
    fn show_nodes(&self) -> Answer {
        let driver = driver()?;
        let handles = self.handles.get_or_init(|| self.steps.iter().map(|_| handles::fresh()).collect());
        for (step, &handle) in self.steps.iter().zip(handles) {
            let after = step.after.iter().map(|&node| handles[node]).collect();
            let node = Node { graph: self.handle, kind: step.work.node_type(), after };
            driver.nodes.insert(handle, Arc::new(node));
        }
        Ok(())
    }
}

fn node_handles(graph: &Graph) -> Answer<&Vec<usize>> {
    if graph.handles.get().is_none() {
        graph.show_nodes()?;
    }
    Ok(graph.handles.get().expect("show_nodes has made them"))
}

/// The two-step protocol of the list queries: the count alone, or as many as fit.
///
/// # Safety
/// `place` is null or has room for `*count` handles; `count` is valid.
unsafe fn give_list(list: &[usize], place: *mut Handle, count: *mut usize) -> Answer {
    if count.is_null() {
        return refuse(Code::INVALID_VALUE, "the pointer for the count is null");
    }
    // SAFETY: guaranteed by the caller.
    unsafe {
        if !place.is_null() {
            for at in 0..*count {
                let handle = list.get(at).copied().unwrap_or(0);
                place.add(at).write(handle as Handle);
            }
            *count = list.len().min(*count);
        } else {
            *count = list.len();
        }
    }
    Ok(())
}

exports! { GRAPH:
    fn cuGraphInstantiate(
        exec: *mut Handle, graph: Handle, error_node: *mut Handle, log: *mut c_char, log_bytes: usize,
    ) {
        let _ = (log, log_bytes);
        give_if_asked(error_node, std::ptr::null_mut());
        give(exec, instantiate(graph, 0)?, "the executable graph")
    }

    fn cuGraphInstantiate_v2(
        exec: *mut Handle, graph: Handle, error_node: *mut Handle, log: *mut c_char, log_bytes: usize,
    ) {
        let _ = (log, log_bytes);
        give_if_asked(error_node, std::ptr::null_mut());
        give(exec, instantiate(graph, 0)?, "the executable graph")
    }

    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, flags: u64) {
        give(exec, instantiate(graph, flags)?, "the executable graph")
    }

    fn cuGraphInstantiateWithParams(exec: *mut Handle, graph: Handle, params: *mut InstantiateParams) {
        if params.is_null() {
            return refuse(Code::INVALID_VALUE, "the parameters are null");
        }
        let made = instantiate(graph, (*params).flags);
        (*params).error_node = std::ptr::null_mut();
        (*params).result = c_int::from(made.is_err());
        give(exec, made?, "the executable graph")
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        let exec = driver()?.execs.get(exec)?;
        let (context, _) = stream::resolve(stream)?;
        if exec.context != context.handle {
            return refuse(Code::INVALID_HANDLE, "the graph and the stream belong to different contexts");
        }
        stream::submit(stream, Work::Graph(exec))
    }

    fn cuGraphUpload(exec: Handle, stream: Handle) {
        driver()?.execs.get(exec)?;
        let (_, stream) = stream::resolve(stream)?;
        refuse_while_capturing(&stream, "cuGraphUpload")
    }

    fn cuGraphExecDestroy(exec: Handle) {
        driver()?.execs.remove(exec).map(|_| ())
    }

    fn cuGraphExecGetFlags(exec: Handle, flags: *mut u64) {
        give(flags, driver()?.execs.get(exec)?.flags, "the flags")
    }

    fn cuGraphCreate(graph: *mut Handle, flags: c_uint) {
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        let made = Graph {
            handle: handles::fresh(),
            context: current()?.handle,
            steps: Vec::new(),
            handles: OnceLock::new(),
            objects: Objects::default(),
        };
        give(graph, driver()?.graphs.insert(made.handle, Arc::new(made)), "the graph")
    }

    fn cuGraphClone(clone: *mut Handle, graph: Handle) {
        let original = driver()?.graphs.get(graph)?;
        let made = Graph {
            handle: handles::fresh(),
            context: original.context,
            steps: original.steps.clone(),
            handles: OnceLock::new(),
            objects: original.objects.clone(),
        };
        give(clone, driver()?.graphs.insert(made.handle, Arc::new(made)), "the graph")
    }

    fn cuGraphDestroy(graph: Handle) {
        let driver = driver()?;
        let graph = driver.graphs.remove(graph)?;
        driver.nodes.take(|node| node.graph == graph.handle);
        Ok(())
    }

    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let graph = driver()?.graphs.get(graph)?;
        give_list(node_handles(&graph)?, nodes, count)
    }

    fn cuGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        let graph = driver()?.graphs.get(graph)?;
        let all = node_handles(&graph)?;
        let roots = graph.steps.iter().zip(all).filter(|(step, _)| step.after.is_empty());
        let roots: Vec<usize> = roots.map(|(_, &handle)| handle).collect();
        give_list(&roots, nodes, count)
    }

    fn cuGraphGetEdges(graph: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) {
        let graph = driver()?.graphs.get(graph)?;
        let all = node_handles(&graph)?;
        let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
        for (step, &handle) in graph.steps.iter().zip(all) {
            for &before in &step.after {
                firsts.push(all[before]);
                seconds.push(handle);
            }
        }
        let mut same_count = if count.is_null() { 0 } else { *count };
        give_list(&firsts, from, &mut same_count)?;
        give_list(&seconds, to, count)
    }

    fn cuGraphNodeGetType(node: Handle, kind: *mut c_int) {
        give(kind, driver()?.nodes.get(node)?.kind, "the type")
    }

    fn cuGraphNodeGetDependencies(node: Handle, nodes: *mut Handle, count: *mut usize) {
        give_list(&driver()?.nodes.get(node)?.after, nodes, count)
    }

    fn cuGraphDebugDotPrint(graph: Handle, path: *const c_char, flags: c_uint) {
        let _ = flags;
        let graph = driver()?.graphs.get(graph)?;
        let path = super::call::text(path, "the path")?;
        let mut text = String::from("digraph graph_of_a_capture {\n");
        for (node, step) in graph.steps.iter().enumerate() {
            text += &format!("  {node} [label=\"{}\"];\n", step.work.describe().replace('"', "'"));
            for before in &step.after {
                text += &format!("  {before} -> {node};\n");
            }
        }
        text += "}\n";
        std::fs::write(path, text).or_else(|why| refuse(Code::OPERATING_SYSTEM, format!("{path}: {why}")))
    }
}

/// For captures of memory: the graph memory that a captured free refers to.
pub fn captured_memory(stream: &Stream, address: DevicePointer) -> Answer<Option<Arc<GraphMemory>>> {
    let mut captures = driver()?.captures.lock().unwrap();
    Ok(of_stream(&mut captures, stream).and_then(|(_, capture)| {
        capture.nodes.iter().find_map(|step| match &*step.work {
            Work::Alloc(memory) if memory.address == address => Some(memory.clone()),
            _ => None,
        })
    }))
}

/// Invalidates the stream's capture because of a call that failed.
pub fn break_capture<T>(stream: &Stream, refusal: Refusal) -> Answer<T> {
    if let Some((_, capture)) = of_stream(&mut driver()?.captures.lock().unwrap(), stream) {
        capture.invalid.get_or_insert(refusal.message.clone());
    }
    Err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(edges: &[&[usize]]) -> Vec<Step> {
        edges.iter().map(|after| Step { work: Arc::new(Work::Nothing), after: after.to_vec() }).collect()
    }

    #[test]
    fn random_orders_respect_the_edges_and_differ() {
        // 0 -> {1, 2, 3} -> 4, and 5 alone.
        let steps = steps(&[&[], &[0], &[0], &[0], &[1, 2, 3], &[]]);
        let mut seen = BTreeSet::new();
        for seed in 0..64 {
            let order = order(&steps, Some(seed));
            let place = |node: usize| order.iter().position(|&other| other == node).unwrap();
            assert_eq!(order.len(), steps.len());
            for (node, step) in steps.iter().enumerate() {
                assert!(step.after.iter().all(|&before| place(before) < place(node)));
            }
            seen.insert(order);
        }
        assert!(seen.len() > 10, "{} different orders of 30", seen.len());
        assert_eq!(order(&steps, None), [0, 1, 2, 3, 4, 5]);
    }
}
