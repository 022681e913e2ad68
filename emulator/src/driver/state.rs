//! The driver's state: devices, contexts, and a table for every kind of handle.
//!
//! One `Driver` per process, created by `cuInit` and never dropped. Locks are held only while a table or an object is
//! accessed. The exceptions are [`Context::order`] and a stream's own lock, which are held while its work runs.

use super::call::{Answer, Refusal, refuse};
use super::codes::Code;
use super::event::Event;
use super::graph::{Capture, Graph, GraphExec, GraphMemory, Node};
use super::handles::{self, Table};
use super::linker::Link;
use super::module::{Function, LoadedImage};
use super::order::Order;
use super::pool::Pool;
use super::profile::Profile;
use super::registered::Registered;
use super::settings::{self, Log, Settings};
use super::stream::Stream;
use super::user_object::UserObject;
use crate::memory::Memory;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::thread::ThreadId;

/// An opaque handle of the API.
pub type Handle = *mut c_void;

/// An address on a device.
pub type DevicePointer = u64;

pub struct Driver {
    pub settings: Settings,
    pub devices: Vec<Device>,
    pub contexts: Table<Context>,
    pub streams: Table<Stream>,
    pub events: Table<Event>,
    pub links: Table<Link>,
    pub modules: Table<LoadedImage>,
    pub functions: Table<Function>,
    pub graphs: Table<Graph>,
    pub nodes: Table<Node>,
    pub execs: Table<GraphExec>,
    pub pools: Table<Pool>,
    pub user_objects: Table<UserObject>,
    /// Host memory that programs registered, by its first byte.
    pub registered: Mutex<BTreeMap<u64, Registered>>,
    /// Live capture sequences by their id.
    pub captures: Mutex<BTreeMap<u64, Capture>>,
    pub profile: Mutex<Profile>,
    /// What comes before what, and who accessed which memory.
    pub order: Mutex<Order>,
}

pub struct Device {
    pub ordinal: c_int,
    pub memory: Memory,
    pub primary: Mutex<Primary>,
    pub default_pool: Arc<Pool>,
    pub pool: Mutex<Arc<Pool>>,
    /// Live allocations by first address: who made them, and how.
    pub allocations: Mutex<BTreeMap<DevicePointer, Owned>>,
}

/// A device's primary context and how often it is retained.
#[derive(Default)]
pub struct Primary {
    pub context: Option<Arc<Context>>,
    pub retained: u32,
    pub flags: c_uint,
}

/// What the driver knows of an allocation in addition to [`Memory`].
#[derive(Clone)]
pub struct Owned {
    pub bytes: u64,
    pub kind: Kind,
    /// Handle of the context that made it.
    pub context: usize,
    /// The exported function that allocated it.
    pub made_by: &'static str,
}

#[derive(Clone)]
pub enum Kind {
    /// cuMemAlloc.
    Device,
    /// cuMemAllocAsync, from this pool.
    Pooled(Arc<Pool>),
    /// cuMemHostAlloc, with its flags.
    Host(c_uint),
    /// Mirror of the registered host memory that begins at this address.
    Mirror(u64),
    /// cuMemAllocManaged.
    Managed,
    /// An allocation node of a captured graph.
    Graph(Weak<GraphMemory>),
}

impl Kind {
    fn describe(&self) -> &'static str {
        match self {
            Kind::Device => "device memory",
            Kind::Pooled(_) => "stream-ordered device memory",
            Kind::Host(_) => "pinned host memory",
            Kind::Mirror(_) => "registered host memory",
            Kind::Managed => "managed memory",
            Kind::Graph(_) => "memory of a graph",
        }
    }
}

pub struct Context {
    pub handle: usize,
    pub device: c_int,
    pub primary: bool,
    pub flags: AtomicU32,
    /// References: those of cuCtxCreate and cuCtxAttach, less those of cuCtxDetach.
    pub attached: AtomicU32,
    /// The NULL stream.
    pub legacy: Arc<Stream>,
    /// Default stream per host thread, created on first use.
    pub per_thread: Mutex<HashMap<ThreadId, Arc<Stream>>>,
    /// Held for writing while the legacy stream works, for reading while a blocking stream does.
    pub order: RwLock<()>,
    /// The fault that made the context unusable.
    pub fault: Mutex<Option<Refusal>>,
    pub limits: Mutex<BTreeMap<c_int, usize>>,
    pub cache_config: AtomicU32,
}

impl Context {
    fn new(device: c_int, primary: bool, flags: c_uint) -> Arc<Context> {
        let handle = handles::fresh();
        Arc::new(Context {
            handle,
            device,
            primary,
            flags: AtomicU32::new(flags),
            attached: AtomicU32::new(1),
            legacy: Arc::new(Stream::new(handle, super::stream::Role::Legacy)),
            per_thread: Mutex::default(),
            order: RwLock::new(()),
            fault: Mutex::new(None),
            limits: Mutex::new(BTreeMap::new()),
            cache_config: AtomicU32::new(0),
        })
    }

    pub fn device(&self) -> Answer<&'static Device> {
        device(self.device)
    }

    /// Refuses if an earlier kernel's fault has made the context unusable.
    pub fn check(&self) -> Answer {
        match &*self.fault.lock().unwrap() {
            None => Ok(()),
            Some(fault) => {
                refuse(fault.code, format!("the context is unusable since an earlier fault: {}", fault.message))
            }
        }
    }

    /// Records a fault (the first one is kept) and returns it.
    pub fn fail<T>(&self, fault: Refusal) -> Answer<T> {
        self.fault.lock().unwrap().get_or_insert_with(|| fault.clone());
        Err(fault)
    }
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static INIT: Mutex<()> = Mutex::new(());

/// This process was forked from one that had started the driver; the threads that run kernels stayed behind.
static FORKED: AtomicBool = AtomicBool::new(false);

fn in_child<T>() -> Answer<T> {
    refuse(Code::NOT_INITIALIZED, "the driver was started before this process was forked: start it in the child only")
}

extern "C" fn mark_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// What `cuInit` does.
pub fn init() -> Answer<&'static Driver> {
    if FORKED.load(Ordering::Relaxed) {
        return in_child();
    }
    let _one_at_a_time = INIT.lock().unwrap();
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    // SAFETY: the handler only stores a flag. If it cannot be registered, a child that calls the driver waits for ever.
    unsafe { libc::pthread_atfork(None, None, Some(mark_child)) };
    let settings = match Settings::from_environment() {
        Ok(settings) => settings,
        Err(why) => return refuse(Code::INVALID_VALUE, why),
    };
    let pools = Table::new("memory pool");
    let devices = (0..settings.devices as c_int)
        .map(|ordinal| {
            let default_pool = Pool::new(ordinal, true);
            pools.insert(default_pool.handle, default_pool.clone());
            Device {
                ordinal,
                memory: Memory::filled(settings.memory, settings.run.exec.blocks > 0),
                primary: Mutex::default(),
                pool: Mutex::new(default_pool.clone()),
                default_pool,
                allocations: Mutex::default(),
            }
        })
        .collect();
    let driver = DRIVER.get_or_init(|| Driver {
        settings,
        devices,
        contexts: Table::new("context"),
        streams: Table::new("stream"),
        events: Table::new("event"),
        links: Table::new("link"),
        modules: Table::new("module"),
        functions: Table::new("function"),
        graphs: Table::new("graph"),
        nodes: Table::new("graph node"),
        execs: Table::new("executable graph"),
        pools,
        user_objects: Table::new("user object"),
        registered: Mutex::default(),
        captures: Mutex::default(),
        profile: Mutex::default(),
        order: Mutex::default(),
    });
    super::profile::write_at_exit(driver);
    Ok(driver)
}

/// The driver, once `cuInit` was called.
pub fn driver() -> Answer<&'static Driver> {
    match DRIVER.get() {
        Some(_) if FORKED.load(Ordering::Relaxed) => in_child(),
        Some(driver) => Ok(driver),
        None => refuse(Code::NOT_INITIALIZED, "cuInit has not been called"),
    }
}

/// The driver, if it has been initialised.
pub fn driver_if_any() -> Option<&'static Driver> {
    DRIVER.get()
}

pub fn device(ordinal: c_int) -> Answer<&'static Device> {
    let devices = &driver()?.devices;
    match usize::try_from(ordinal).ok().and_then(|at| devices.get(at)) {
        Some(device) => Ok(device),
        None => {
            refuse(Code::INVALID_DEVICE, format!("there is no device {ordinal}: the machine has {}", devices.len()))
        }
    }
}

thread_local! {
    /// This host thread's stack of contexts; the last one is current. 0 stands for none.
    static CURRENT: RefCell<ManuallyDrop<Vec<usize>>> = const { RefCell::new(ManuallyDrop::new(Vec::new())) };
}

/// Handle of this thread's current context, null without one.
pub fn current_handle() -> Handle {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0) as Handle)
}

/// The current context, usable or not.
pub fn current_even_if_faulty() -> Answer<Arc<Context>> {
    let driver = driver()?;
    let handle = current_handle();
    if handle.is_null() {
        return refuse(Code::INVALID_CONTEXT, "this thread has no current context: call cuCtxSetCurrent first");
    }
    driver
        .contexts
        .get(handle)
        .or_else(|_| refuse(Code::CONTEXT_IS_DESTROYED, "this thread's current context was destroyed"))
}

/// The current context; refuses one with a fault.
pub fn current() -> Answer<Arc<Context>> {
    let context = current_even_if_faulty()?;
    context.check()?;
    Ok(context)
}

/// The context behind a handle; null is the current one.
pub fn context_or_current(handle: Handle) -> Answer<Arc<Context>> {
    if handle.is_null() {
        return current();
    }
    match driver()?.contexts.get(handle) {
        Ok(context) => Ok(context),
        Err(why) => refuse(Code::INVALID_CONTEXT, why.message),
    }
}

/// Replaces the top of the stack; null empties it.
pub fn set_current(handle: Handle) {
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        if !handle.is_null() {
            stack.push(handle as usize);
        }
    });
}

pub fn push_current(handle: Handle) {
    CURRENT.with_borrow_mut(|stack| stack.push(handle as usize));
}

pub fn pop_current() -> Handle {
    CURRENT.with_borrow_mut(|stack| stack.pop().unwrap_or(0) as Handle)
}

/// Makes a context of its own, as `cuCtxCreate` does.
pub fn create_context(ordinal: c_int, flags: c_uint) -> Answer<Arc<Context>> {
    device(ordinal)?;
    let context = Context::new(ordinal, false, flags);
    driver()?.contexts.insert(context.handle, context.clone());
    Ok(context)
}

/// The device's primary context, made if it is not there.
pub fn retain_primary(ordinal: c_int) -> Answer<Arc<Context>> {
    let driver = driver()?;
    let mut primary = device(ordinal)?.primary.lock().unwrap();
    let flags = primary.flags;
    let context = primary.context.get_or_insert_with(|| {
        let context = Context::new(ordinal, true, flags);
        driver.contexts.insert(context.handle, context.clone());
        context
    });
    let context = context.clone();
    primary.retained += 1;
    Ok(context)
}

/// Drops one reference to the primary context; the last one destroys it.
pub fn release_primary(ordinal: c_int) -> Answer {
    let device = device(ordinal)?;
    let last = {
        let mut primary = device.primary.lock().unwrap();
        match primary.retained {
            0 => {
                return refuse(
                    Code::INVALID_CONTEXT,
                    format!("the primary context of device {ordinal} is not retained"),
                );
            }
            1 => {
                primary.retained = 0;
                primary.context.take()
            }
            _ => {
                primary.retained -= 1;
                None
            }
        }
    };
    match last {
        Some(context) => destroy_context(&context),
        None => Ok(()),
    }
}

/// Destroys the primary context however many references there are.
pub fn reset_primary(ordinal: c_int) -> Answer {
    let taken = {
        let mut primary = device(ordinal)?.primary.lock().unwrap();
        primary.retained = 0;
        primary.context.take()
    };
    match taken {
        Some(context) => destroy_context(&context),
        None => Ok(()),
    }
}

/// Destroys a context with all that it owns, and reports leaks.
///
/// After a fault nothing is reported: the program could no longer free anything.
pub fn destroy_context(context: &Arc<Context>) -> Answer {
    let driver = driver()?;
    let device = context.device()?;
    let own = context.handle;
    driver.contexts.remove(own as Handle)?;
    // Every launch under way is done once the lock is had; it guards no data that a panic could have broken.
    drop(context.order.write().unwrap_or_else(PoisonError::into_inner));
    super::graph::forget_context(own)?;
    context.legacy.settle();

    let mut leaks = Vec::new();
    let mut forgotten = |count: usize, what: &str| match count {
        0 => (),
        1 => leaks.push(format!("1 {what}")),
        _ => leaks.push(format!("{count} {what}s")),
    };
    let streams = driver.streams.take(|stream| stream.context == own);
    streams.iter().for_each(|stream| stream.settle());
    forgotten(streams.len(), "stream");
    let events = driver.events.take(|event| event.context == own);
    forgotten(events.len(), "event");
    let execs = driver.execs.take(|exec| exec.context == own);
    forgotten(execs.len(), "executable graph");
    let graphs = driver.graphs.take(|graph| graph.context == own);
    forgotten(graphs.len(), "graph");
    let modules = driver.modules.take(|image| image.context == own);
    forgotten(modules.len(), "module");
    forgotten(driver.links.take(|link| link.context == own).len(), "link");
    driver.functions.take(|function| function.image.context == own);
    for image in modules {
        image.unload(&device.memory);
    }
    forgotten(super::registered::forget_context(own)?, "registered range of host memory");
    let left: Vec<(DevicePointer, Owned)> = {
        let mut allocations = device.allocations.lock().unwrap();
        let addresses: Vec<DevicePointer> =
            allocations.iter().filter(|(_, owned)| owned.context == own).map(|(&address, _)| address).collect();
        addresses.iter().filter_map(|address| Some((*address, allocations.remove(address)?))).collect()
    };
    for (address, owned) in &left {
        if !matches!(owned.kind, Kind::Graph(_)) {
            let serial = device.memory.find(*address).map_or(0, |allocation| allocation.serial);
            leaks.push(format!(
                "{} bytes of {} at {address:#x} (allocation {serial}, by {})",
                owned.bytes,
                owned.kind.describe(),
                owned.made_by
            ));
        }
        if let Kind::Pooled(pool) = &owned.kind {
            pool.give_back(owned.bytes);
        }
        // An address that `Memory` no longer knows has nothing left to free.
        let _ = device.memory.free(*address);
        super::order::forget_memory(*address)?;
    }
    super::order::forget_context(own)?;

    let faulty = context.fault.lock().unwrap().is_some();
    let wanted = settings::of_this_thread(&driver.settings.run).leaks;
    if wanted && !faulty && !leaks.is_empty() {
        let report = format!(
            "leak: the context of device {} was destroyed with {} still alive",
            context.device,
            leaks.join(", ")
        );
        if settings::log() != Log::None {
            eprintln!("cuda_emu: {report}");
        }
        driver.profile.lock().unwrap().leaks.push(report);
    }
    super::profile::write(driver);
    Ok(())
}

impl Device {
    /// The live allocation that holds `address`, with its first address.
    pub fn owner(&self, address: DevicePointer) -> Option<(DevicePointer, Owned)> {
        let allocations = self.allocations.lock().unwrap();
        let (&first, owned) = allocations.range(..=address).next_back()?;
        (address - first < owned.bytes.max(1)).then(|| (first, owned.clone()))
    }
}

/// The device whose allocation holds `address`.
pub fn device_of(address: DevicePointer) -> Option<(&'static Device, DevicePointer, Owned)> {
    driver_if_any()?.devices.iter().find_map(|device| {
        let (first, owned) = device.owner(address)?;
        Some((device, first, owned))
    })
}

/// Loads an atomic.
pub fn load(value: &AtomicU32) -> u32 {
    value.load(Ordering::Relaxed)
}
