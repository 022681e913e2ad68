//! Allocation, copies and fills.
//!
//! Not here: arrays and textures, virtual memory management (cuMemCreate, cuMemMap), memory shared between processes.

use super::call::{Answer, exports, give, give_if_asked, refuse};
use super::codes::Code;
use super::graph::{self, GraphMemory};
use super::order;
use super::pool::{self, LOCATION_DEVICE, Location, Pool};
use super::registered;
use super::settings;
use super::state::{self, Context, Device, DevicePointer, Handle, Kind, Owned, current, driver};
use super::stream::{self, Stream};
use super::work::{Copy, Fill, Place, Work, from_memory};
use crate::exec::Span;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

fn out_of_memory<T>(device: &Device, bytes: u64) -> Answer<T> {
    refuse(
        Code::OUT_OF_MEMORY,
        format!(
            "{bytes} bytes were asked for; device {} has {} of {} in use",
            device.ordinal,
            device.memory.used(),
            device.memory.limit()
        ),
    )
}

fn refuse_nothing(bytes: usize) -> Answer {
    match bytes {
        0 => refuse(Code::INVALID_VALUE, "0 bytes were asked for"),
        _ => Ok(()),
    }
}

/// Allocates device memory and registers it.
fn allocate(context: &Context, bytes: usize, kind: Kind, made_by: &'static str) -> Answer<DevicePointer> {
    refuse_nothing(bytes)?;
    let device = context.device()?;
    let bytes = bytes as u64;
    let host = matches!(kind, Kind::Host(_) | Kind::Managed);
    let made = if host {
        device.memory.alloc_host(bytes)
    } else {
        // Memory that pools retain counts as used; it is released before an allocation fails.
        let room = device.memory.limit() - device.memory.used().min(device.memory.limit());
        if bytes > room.saturating_sub(pool::kept_by_pools(device)) {
            pool::trim_all(device);
        }
        device.memory.alloc(bytes)
    };
    let Some(address) = made else {
        return out_of_memory(device, bytes);
    };
    device.allocations.lock().unwrap().insert(address, Owned { bytes, kind, context: context.handle, made_by });
    Ok(address)
}

fn allocate_now(bytes: usize, kind: Kind, made_by: &'static str) -> Answer<DevicePointer> {
    let context = current()?;
    graph::refuse_unsafe_call()?;
    allocate(&context, bytes, kind, made_by)
}

/// Unregisters an allocation, given its first address, if `expected` accepts its kind.
fn disown(address: DevicePointer, expected: impl Fn(&Kind) -> bool) -> Answer<(&'static Device, Owned)> {
    match state::device_of(address) {
        Some((device, first, owned)) if first == address => {
            if !expected(&owned.kind) {
                return refuse(
                    Code::INVALID_VALUE,
                    format!("{address:#x} was allocated by {} and must be freed by its counterpart", owned.made_by),
                );
            }
            device.allocations.lock().unwrap().remove(&address);
            order::forget_memory(address)?;
            Ok((device, owned))
        }
        Some((_, first, owned)) => refuse(
            Code::INVALID_VALUE,
            format!(
                "{address:#x} is not the start of an allocation: it lies {} bytes inside one of {} bytes at {first:#x}",
                address - first,
                owned.bytes
            ),
        ),
        None => {
            let memory = &current()?.device()?.memory;
            if memory.find(address).is_some() {
                return refuse(Code::INVALID_VALUE, format!("{address:#x} is a variable of a module"));
            }
            // `Memory` knows what used to be there, for the message.
            match memory.free(address) {
                Err(why) => Err(from_memory(why)),
                Ok(()) => refuse(Code::INVALID_VALUE, format!("{address:#x} was not allocated")),
            }
        }
    }
}

fn free_device(address: DevicePointer) -> Answer {
    let graph_memory = matches!(
        state::device_of(address),
        Some((_, first, Owned { kind: Kind::Graph(_), .. })) if first == address
    );
    if graph_memory {
        return refuse(
            Code::INVALID_VALUE,
            format!("{address:#x} is memory of a graph: free it in the graph, or with cuMemFreeAsync"),
        );
    }
    let (device, owned) = disown(address, |kind| !matches!(kind, Kind::Host(_) | Kind::Mirror(_)))?;
    if let Kind::Pooled(pool) = &owned.kind {
        pool.give_back(owned.bytes);
    }
    device.memory.free(address).map_err(from_memory)
}

fn free_now(address: DevicePointer) -> Answer {
    let context = current()?;
    if address == 0 {
        return Ok(());
    }
    graph::refuse_unsafe_call()?;
    // A free waits for all work of the context.
    stream::settle_all(&context)?;
    order::host_waited_for_all(&context)?;
    free_device(address)
}

/// `cuMemAllocAsync`: from the pool, or as a node of the stream's capture.
fn allocate_in_stream(
    handle: Handle,
    bytes: usize,
    pool: Option<Arc<Pool>>,
    made_by: &'static str,
) -> Answer<DevicePointer> {
    let (context, stream) = stream::resolve(handle)?;
    if bytes == 0 {
        return Ok(0); // unlike cuMemAlloc, and free_in_stream takes it back
    }
    if graph::is_capturing(&stream)? {
        let address = allocate(&context, bytes, Kind::Graph(Weak::new()), made_by)?;
        let memory = Arc::new(GraphMemory {
            device: context.device,
            address,
            bytes: bytes as u64,
            live: AtomicBool::new(false),
        });
        let mut allocations = context.device()?.allocations.lock().unwrap();
        if let Some(owned) = allocations.get_mut(&address) {
            owned.kind = Kind::Graph(Arc::downgrade(&memory));
        }
        drop(allocations);
        graph::capture(&stream, Work::Alloc(memory))?;
        return Ok(address);
    }
    graph::refuse_implicit_use(&stream)?;
    let pool = match pool {
        Some(pool) => pool,
        None => context.device()?.pool.lock().unwrap().clone(),
    };
    if pool.device != context.device {
        return refuse(
            Code::INVALID_VALUE,
            format!("the pool belongs to device {}, the stream to device {}", pool.device, context.device),
        );
    }
    pool.take(bytes as u64)?;
    let address = allocate(&context, bytes, Kind::Pooled(pool.clone()), made_by).inspect_err(|_| {
        pool.give_back(bytes as u64);
    })?;
    write_in_order(&context, &stream, made_by, address, bytes as u64)?;
    Ok(address)
}

/// For the order of streams, to allocate or free memory in one is to write all of it.
fn write_in_order(context: &Context, stream: &Stream, what: &str, first: DevicePointer, bytes: u64) -> Answer {
    let span = Span { first, end: first + bytes, write: true, whole: true, strong: false };
    let run = settings::of_this_thread(&driver()?.settings.run);
    order::begin(stream)?;
    order::access(context, stream, &run, what, true, &[span])
}

fn free_in_stream(address: DevicePointer, handle: Handle) -> Answer {
    let (context, stream) = stream::resolve(handle)?;
    if address == 0 {
        return Ok(());
    }
    if graph::is_capturing(&stream)? {
        return match graph::captured_memory(&stream, address)? {
            Some(memory) => graph::capture(&stream, Work::Free(memory)).map(|_| ()),
            None => graph::break_capture(
                &stream,
                super::call::Refusal {
                    code: Code::INVALID_VALUE,
                    message: format!("a capture can only free memory that it allocated, and {address:#x} is not"),
                },
            ),
        };
    }
    graph::refuse_implicit_use(&stream)?;
    let owned = state::device_of(address).filter(|(_, first, _)| *first == address).map(|(_, _, owned)| owned);
    if let Some(owned) = &owned {
        write_in_order(&context, &stream, "cuMemFreeAsync", address, owned.bytes)?;
    }
    let of_graph = match owned {
        Some(Owned { kind: Kind::Graph(memory), .. }) => memory.upgrade(),
        _ => None,
    };
    if let Some(memory) = of_graph {
        return match memory.live.swap(false, Ordering::Relaxed) {
            true => Ok(()),
            false => refuse(Code::INVALID_VALUE, format!("memory of a graph at {address:#x} is not allocated now")),
        };
    }
    // Earlier work in the stream is done; work of other threads on this stream comes first too.
    stream.settle();
    context.check()?;
    free_device(address)
}

fn free_host(pointer: *mut c_void) -> Answer {
    current()?;
    graph::refuse_unsafe_call()?;
    if pointer.is_null() {
        return refuse(Code::INVALID_VALUE, "the pointer is null");
    }
    let (device, _) = disown(pointer as u64, |kind| matches!(kind, Kind::Host(_)))?;
    device.memory.free(pointer as u64).map_err(from_memory)
}

const HOST_FLAGS: c_uint = 1 | 2 | 4;

fn allocate_host(bytes: usize, flags: c_uint, made_by: &'static str) -> Answer<*mut c_void> {
    if flags & !HOST_FLAGS != 0 {
        return refuse(
            Code::INVALID_VALUE,
            format!("flags {flags:#x} are not known: portable 1, device map 2, write-combined 4"),
        );
    }
    Ok(allocate_now(bytes, Kind::Host(flags), made_by)? as *mut c_void)
}

fn copy(to: Place, from: Place, bytes: usize) -> Work {
    Work::Copy(Copy::line(to, from, bytes))
}

fn fill(to: DevicePointer, pattern: u32, element: usize, count: usize) -> Answer<Work> {
    fill_rows(to, 0, pattern, element, count, 1)
}

fn fill_rows(
    to: DevicePointer,
    pitch: usize,
    pattern: u32,
    element: usize,
    count: usize,
    height: usize,
) -> Answer<Work> {
    // A product that does not fit leaves no room for the box either.
    let width = count.saturating_mul(element);
    if height > 1 && pitch < width {
        return refuse(Code::INVALID_VALUE, format!("rows of {width} bytes do not fit pitch {pitch}"));
    }
    corner(to, [0; 3], pitch, 0, [width, height, 1])?;
    Ok(Work::Fill(Fill { to, pattern: pattern.to_le_bytes(), element, count, height, pitch }))
}

/// Address of the first byte of a box: x bytes, y rows and z slices behind `base`. Refuses a box that does not end
/// inside the address space, so that no address of it wraps.
fn corner(
    base: u64,
    [x, y, z]: [usize; 3],
    pitch: usize,
    slice: usize,
    [width, height, depth]: [usize; 3],
) -> Answer<u64> {
    let at = |x: usize, y: usize, z: usize| {
        let offset = z.checked_mul(slice)?.checked_add(y.checked_mul(pitch)?)?.checked_add(x)?;
        base.checked_add(offset as u64)
    };
    let last = |first: usize, extent: usize| first.checked_add(extent.saturating_sub(1));
    let end = || at(x.checked_add(width)?, last(y, height)?, last(z, depth)?);
    match (at(x, y, z), end()) {
        (Some(first), Some(_)) => Ok(first),
        _ => refuse(
            Code::INVALID_VALUE,
            format!(
                "{width} by {height} by {depth} bytes from ({x}, {y}, {z}) on, with rows of {pitch} bytes at \
                 {base:#x}, do not end inside the address space"
            ),
        ),
    }
}

/// Refuses an address that is not a multiple of the element size.
fn aligned(to: DevicePointer, element: u64) -> Answer {
    if to.is_multiple_of(element) {
        return Ok(());
    }
    refuse(Code::INVALID_VALUE, format!("{to:#x} is not a multiple of the element size {element}"))
}

/// CUDA_MEMCPY2D.
#[repr(C)]
pub struct Copy2d {
    from_x: usize,
    from_y: usize,
    from_type: c_uint,
    from_host: *const c_void,
    from_device: DevicePointer,
    from_array: Handle,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_uint,
    to_host: *mut c_void,
    to_device: DevicePointer,
    to_array: Handle,
    to_pitch: usize,
    width: usize,
    height: usize,
}

/// CUDA_MEMCPY3D.
#[repr(C)]
pub struct Copy3d {
    from_x: usize,
    from_y: usize,
    from_z: usize,
    from_lod: usize,
    from_type: c_uint,
    from_host: *const c_void,
    from_device: DevicePointer,
    from_array: Handle,
    reserved_0: *mut c_void,
    from_pitch: usize,
    from_height: usize,
    to_x: usize,
    to_y: usize,
    to_z: usize,
    to_lod: usize,
    to_type: c_uint,
    to_host: *mut c_void,
    to_device: DevicePointer,
    to_array: Handle,
    reserved_1: *mut c_void,
    to_pitch: usize,
    to_height: usize,
    width: usize,
    height: usize,
    depth: usize,
}

const TYPE_HOST: c_uint = 1;
const TYPE_DEVICE: c_uint = 2;
const TYPE_UNIFIED: c_uint = 4;

fn place(
    kind: c_uint,
    host: usize,
    device: DevicePointer,
    from: [usize; 3],
    pitch: usize,
    slice: usize,
    size: [usize; 3],
) -> Answer<Place> {
    let corner = |base: u64| corner(base, from, pitch, slice, size);
    match kind {
        TYPE_HOST => Ok(Place::Host(corner(host as u64)? as usize)),
        TYPE_DEVICE => Ok(Place::Device(corner(device)?)),
        TYPE_UNIFIED => Ok(unified(corner(device)?)),
        _ => refuse(Code::NOT_SUPPORTED, format!("memory type {kind} is not emulated: host 1, device 2, unified 4")),
    }
}

/// A place whose address tells where it is.
fn unified(address: DevicePointer) -> Place {
    match state::device_of(address) {
        Some(_) => Place::Device(address),
        None => Place::Host(address as usize),
    }
}

/// # Safety
/// `what` is null or valid.
unsafe fn copy_2d(what: *const Copy2d) -> Answer<Work> {
    if what.is_null() {
        return refuse(Code::INVALID_VALUE, "the description of the copy is null");
    }
    // SAFETY: not null, so valid as the caller guarantees.
    let c = unsafe { &*what };
    let or_width = |pitch: usize| if pitch == 0 { c.width } else { pitch };
    let (from_pitch, to_pitch) = (or_width(c.from_pitch), or_width(c.to_pitch));
    let fits = |pitch: usize, x: usize| x.checked_add(c.width).is_some_and(|end| end <= pitch);
    if c.height > 1 && !(fits(from_pitch, c.from_x) && fits(to_pitch, c.to_x)) {
        return refuse(
            Code::INVALID_VALUE,
            format!("rows of {} bytes do not fit pitches {from_pitch} and {to_pitch}", c.width),
        );
    }
    let size = [c.width, c.height, 1];
    let (from, to) = ([c.from_x, c.from_y, 0], [c.to_x, c.to_y, 0]);
    Ok(Work::Copy(Copy {
        from: place(c.from_type, c.from_host as usize, c.from_device, from, from_pitch, 0, size)?,
        to: place(c.to_type, c.to_host as usize, c.to_device, to, to_pitch, 0, size)?,
        width: c.width,
        height: c.height,
        depth: 1,
        from_pitch,
        from_slice: 0,
        to_pitch,
        to_slice: 0,
    }))
}

/// # Safety
/// `what` is null or valid.
unsafe fn copy_3d(what: *const Copy3d) -> Answer<Work> {
    if what.is_null() {
        return refuse(Code::INVALID_VALUE, "the description of the copy is null");
    }
    // SAFETY: not null, so valid as the caller guarantees.
    let c = unsafe { &*what };
    let or = |given: usize, otherwise: usize| if given == 0 { otherwise } else { given };
    let (from_pitch, to_pitch) = (or(c.from_pitch, c.width), or(c.to_pitch, c.width));
    // A slice that does not fit is refused if there is a second one.
    let from_slice = from_pitch.saturating_mul(or(c.from_height, c.height));
    let to_slice = to_pitch.saturating_mul(or(c.to_height, c.height));
    let size = [c.width, c.height, c.depth];
    let (from, to) = ([c.from_x, c.from_y, c.from_z], [c.to_x, c.to_y, c.to_z]);
    Ok(Work::Copy(Copy {
        from: place(c.from_type, c.from_host as usize, c.from_device, from, from_pitch, from_slice, size)?,
        to: place(c.to_type, c.to_host as usize, c.to_device, to, to_pitch, to_slice, size)?,
        width: c.width,
        height: c.height,
        depth: c.depth,
        from_pitch,
        from_slice,
        to_pitch,
        to_slice,
    }))
}

/// Both contexts of a peer copy exist and are those of the addresses.
fn check_peers(to_context: Handle, from_context: Handle) -> Answer {
    for handle in [to_context, from_context] {
        state::context_or_current(handle)?.check()?;
    }
    Ok(())
}

/// Refuses a range that is not managed memory, for advice and prefetching.
fn managed(address: DevicePointer, bytes: usize) -> Answer {
    match state::device_of(address) {
        Some((_, first, owned))
            if matches!(owned.kind, Kind::Managed) && bytes as u64 <= owned.bytes - (address - first) =>
        {
            Ok(())
        }
        _ => refuse(Code::INVALID_VALUE, format!("{bytes} bytes at {address:#x} are not managed memory")),
    }
}

const POINTER_CONTEXT: c_int = 1;
const POINTER_MEMORY_TYPE: c_int = 2;
const POINTER_DEVICE_POINTER: c_int = 3;
const POINTER_HOST_POINTER: c_int = 4;
const POINTER_SYNC_MEMOPS: c_int = 6;
const POINTER_BUFFER_ID: c_int = 7;
const POINTER_IS_MANAGED: c_int = 8;
const POINTER_DEVICE_ORDINAL: c_int = 9;
const POINTER_RANGE_START: c_int = 11;
const POINTER_RANGE_SIZE: c_int = 12;
const POINTER_MAPPED: c_int = 13;
const POINTER_MEMPOOL: c_int = 17;

/// # Safety
/// `data` has room for the attribute's value.
unsafe fn pointer_attribute(data: *mut c_void, attribute: c_int, address: DevicePointer) -> Answer {
    // Registered memory is described like its mirror.
    let mirror = match state::device_of(address) {
        Some(_) => None,
        None => registered::mirror(address)?,
    };
    let address = mirror.unwrap_or(address);
    let Some((device, first, owned)) = state::device_of(address) else {
        return refuse(Code::INVALID_VALUE, format!("{address:#x} is no memory of this driver"));
    };
    let on_host = matches!(owned.kind, Kind::Host(_) | Kind::Mirror(_));
    let host = match owned.kind {
        Kind::Host(_) | Kind::Managed => Some(address),
        Kind::Mirror(host) => Some(host + (address - first)),
        _ => None,
    };
    // SAFETY: guaranteed by the caller, for every write below.
    unsafe {
        match attribute {
            POINTER_CONTEXT => give(data.cast::<Handle>(), owned.context as Handle, "the value"),
            POINTER_MEMORY_TYPE => {
                let kind = if on_host { TYPE_HOST } else { TYPE_DEVICE };
                give(data.cast::<c_uint>(), kind, "the value")
            }
            POINTER_DEVICE_POINTER => give(data.cast::<u64>(), address, "the value"),
            POINTER_HOST_POINTER => match host {
                Some(host) => give(data.cast::<u64>(), host, "the value"),
                None => refuse(Code::INVALID_VALUE, "the host cannot touch this memory"),
            },
            POINTER_SYNC_MEMOPS => give(data.cast::<c_int>(), 0, "the value"),
            POINTER_BUFFER_ID => {
                let serial = device.memory.find(address).map_or(0, |found| found.serial);
                give(data.cast::<u64>(), serial, "the value")
            }
            POINTER_IS_MANAGED => {
                let managed = matches!(owned.kind, Kind::Managed);
                give(data.cast::<u8>(), u8::from(managed), "the value")
            }
            POINTER_DEVICE_ORDINAL => give(data.cast::<c_int>(), device.ordinal, "the value"),
            POINTER_RANGE_START => give(data.cast::<u64>(), first, "the value"),
            POINTER_RANGE_SIZE => give(data.cast::<usize>(), owned.bytes as usize, "the value"),
            POINTER_MAPPED => give(data.cast::<u8>(), 1, "the value"),
            POINTER_MEMPOOL => {
                let pool = match &owned.kind {
                    Kind::Pooled(pool) => pool.handle,
                    _ => 0,
                };
                give(data.cast::<Handle>(), pool as Handle, "the value")
            }
            _ => refuse(Code::NOT_SUPPORTED, format!("pointer attribute {attribute} is not emulated")),
        }
    }
}

fn address_range(first: *mut DevicePointer, bytes: *mut usize, address: DevicePointer) -> Answer {
    match state::device_of(address) {
        Some((_, start, owned)) => {
            // SAFETY: the caller of the exported functions guarantees both pointers.
            unsafe {
                give_if_asked(first, start);
                give_if_asked(bytes, owned.bytes as usize);
            }
            Ok(())
        }
        None => refuse(Code::NOT_FOUND, format!("{address:#x} is no memory of this driver")),
    }
}

/// Rows of a pitched allocation start at multiples of this.
const PITCH: usize = 512;

exports! { MEMORY:
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let context = current()?;
        let device = context.device()?;
        let used = device.memory.used() + pool::kept_by_pools(device);
        give(free, device.memory.limit().saturating_sub(used) as usize, "the free bytes")?;
        give(total, device.memory.limit() as usize, "all bytes")
    }

    fn cuMemAlloc_v2(address: *mut DevicePointer, bytes: usize) {
        give(address, allocate_now(bytes, Kind::Device, "cuMemAlloc")?, "the address")
    }

    fn cuMemAllocPitch_v2(
        address: *mut DevicePointer, pitch: *mut usize, width: usize, height: usize, element: c_uint,
    ) {
        if !matches!(element, 4 | 8 | 16) {
            return refuse(Code::INVALID_VALUE, format!("the element size must be 4, 8 or 16, not {element}"));
        }
        let rows = width.checked_next_multiple_of(PITCH);
        let Some((rows, bytes)) = rows.and_then(|rows| Some((rows, rows.checked_mul(height)?))) else {
            return refuse(Code::INVALID_VALUE, format!("{width} by {height} bytes are too many"));
        };
        give(address, allocate_now(bytes, Kind::Device, "cuMemAllocPitch")?, "the address")?;
        give(pitch, rows, "the pitch")
    }

    fn cuMemAllocManaged(address: *mut DevicePointer, bytes: usize, flags: c_uint) {
        if !matches!(flags, 1 | 2) {
            return refuse(Code::INVALID_VALUE, format!("the attachment must be 1 (global) or 2 (host), not {flags}"));
        }
        give(address, allocate_now(bytes, Kind::Managed, "cuMemAllocManaged")?, "the address")
    }

    fn cuMemFree_v2(address: DevicePointer) {
        free_now(address)
    }

    fn cuMemAllocAsync(address: *mut DevicePointer, bytes: usize, stream: Handle) {
        give(address, allocate_in_stream(stream, bytes, None, "cuMemAllocAsync")?, "the address")
    }

    fn cuMemAllocFromPoolAsync(address: *mut DevicePointer, bytes: usize, pool: Handle, stream: Handle) {
        let pool = driver()?.pools.get(pool)?;
        give(address, allocate_in_stream(stream, bytes, Some(pool), "cuMemAllocFromPoolAsync")?, "the address")
    }

    fn cuMemFreeAsync(address: DevicePointer, stream: Handle) {
        free_in_stream(address, stream)
    }

    fn cuMemAllocHost_v2(pointer: *mut *mut c_void, bytes: usize) {
        give(pointer, allocate_host(bytes, 0, "cuMemAllocHost")?, "the pointer")
    }

    fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint) {
        give(pointer, allocate_host(bytes, flags, "cuMemHostAlloc")?, "the pointer")
    }

    fn cuMemFreeHost(pointer: *mut c_void) {
        free_host(pointer)
    }

    fn cuMemGetAddressRange_v2(first: *mut DevicePointer, bytes: *mut usize, address: DevicePointer) {
        address_range(first, bytes, address)
    }

    fn cuPointerGetAttribute(data: *mut c_void, attribute: c_int, address: DevicePointer) {
        pointer_attribute(data, attribute, address)
    }

    fn cuPointerGetAttributes(
        count: c_uint, attributes: *const c_int, data: *const *mut c_void, address: DevicePointer,
    ) {
        if attributes.is_null() || data.is_null() {
            return refuse(Code::INVALID_VALUE, "the list of attributes or of places is null");
        }
        for at in 0..count as usize {
            pointer_attribute(data.add(at).read(), attributes.add(at).read(), address)?;
        }
        Ok(())
    }

    fn cuMemAdvise(address: DevicePointer, bytes: usize, advice: c_int, device: c_int) {
        let _ = (advice, device);
        managed(address, bytes)
    }

    fn cuMemAdvise_v2(address: DevicePointer, bytes: usize, advice: c_int, location: Location) {
        let _ = (advice, location);
        managed(address, bytes)
    }

    fn cuMemPrefetchAsync(address: DevicePointer, bytes: usize, device: c_int, stream: Handle) {
        let _ = device;
        managed(address, bytes)?;
        stream::submit(stream, Work::Nothing)
    }

    fn cuMemPrefetchAsync_v2(address: DevicePointer, bytes: usize, location: Location, flags: c_uint, stream: Handle) {
        if location.kind == LOCATION_DEVICE {
            state::device(location.id)?;
        }
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        managed(address, bytes)?;
        stream::submit(stream, Work::Nothing)
    }

    fn cuMemcpy(to: DevicePointer, from: DevicePointer, bytes: usize) {
        stream::run_synchronously(copy(unified(to), unified(from), bytes))
    }

    fn cuMemcpyAsync(to: DevicePointer, from: DevicePointer, bytes: usize, stream: Handle) {
        stream::submit(stream, copy(unified(to), unified(from), bytes))
    }

    fn cuMemcpyHtoD_v2(to: DevicePointer, from: *const c_void, bytes: usize) {
        stream::run_synchronously(copy(Place::Device(to), Place::Host(from as usize), bytes))
    }

    fn cuMemcpyHtoDAsync_v2(to: DevicePointer, from: *const c_void, bytes: usize, stream: Handle) {
        stream::submit(stream, copy(Place::Device(to), Place::Host(from as usize), bytes))
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: DevicePointer, bytes: usize) {
        stream::run_synchronously(copy(Place::Host(to as usize), Place::Device(from), bytes))
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: DevicePointer, bytes: usize, stream: Handle) {
        stream::submit(stream, copy(Place::Host(to as usize), Place::Device(from), bytes))
    }

    fn cuMemcpyDtoD_v2(to: DevicePointer, from: DevicePointer, bytes: usize) {
        stream::run_synchronously(copy(Place::Device(to), Place::Device(from), bytes))
    }

    fn cuMemcpyDtoDAsync_v2(to: DevicePointer, from: DevicePointer, bytes: usize, stream: Handle) {
        stream::submit(stream, copy(Place::Device(to), Place::Device(from), bytes))
    }

    fn cuMemcpyPeer(to: DevicePointer, to_context: Handle, from: DevicePointer, from_context: Handle, bytes: usize) {
        check_peers(to_context, from_context)?;
        stream::run_synchronously(copy(Place::Device(to), Place::Device(from), bytes))
    }

    fn cuMemcpyPeerAsync(
        to: DevicePointer, to_context: Handle, from: DevicePointer, from_context: Handle, bytes: usize, stream: Handle,
    ) {
        check_peers(to_context, from_context)?;
        stream::submit(stream, copy(Place::Device(to), Place::Device(from), bytes))
    }

    fn cuMemcpy2D_v2(what: *const Copy2d) {
        stream::run_synchronously(copy_2d(what)?)
    }

    fn cuMemcpy2DUnaligned_v2(what: *const Copy2d) {
        stream::run_synchronously(copy_2d(what)?)
    }

    fn cuMemcpy2DAsync_v2(what: *const Copy2d, stream: Handle) {
        stream::submit(stream, copy_2d(what)?)
    }

    fn cuMemcpy3D_v2(what: *const Copy3d) {
        stream::run_synchronously(copy_3d(what)?)
    }

    fn cuMemcpy3DAsync_v2(what: *const Copy3d, stream: Handle) {
        stream::submit(stream, copy_3d(what)?)
    }

    fn cuMemsetD8_v2(to: DevicePointer, value: u8, count: usize) {
        stream::run_synchronously(fill(to, value.into(), 1, count)?)
    }

    fn cuMemsetD8Async(to: DevicePointer, value: u8, count: usize, stream: Handle) {
        stream::submit(stream, fill(to, value.into(), 1, count)?)
    }

    fn cuMemsetD16_v2(to: DevicePointer, value: u16, count: usize) {
        aligned(to, 2)?;
        stream::run_synchronously(fill(to, value.into(), 2, count)?)
    }

    fn cuMemsetD16Async(to: DevicePointer, value: u16, count: usize, stream: Handle) {
        aligned(to, 2)?;
        stream::submit(stream, fill(to, value.into(), 2, count)?)
    }

    fn cuMemsetD32_v2(to: DevicePointer, value: u32, count: usize) {
        aligned(to, 4)?;
        stream::run_synchronously(fill(to, value, 4, count)?)
    }

    fn cuMemsetD32Async(to: DevicePointer, value: u32, count: usize, stream: Handle) {
        aligned(to, 4)?;
        stream::submit(stream, fill(to, value, 4, count)?)
    }

    fn cuMemsetD2D8_v2(to: DevicePointer, pitch: usize, value: u8, width: usize, height: usize) {
        stream::run_synchronously(fill_rows(to, pitch, value.into(), 1, width, height)?)
    }

    fn cuMemsetD2D8Async(to: DevicePointer, pitch: usize, value: u8, width: usize, height: usize, stream: Handle) {
        stream::submit(stream, fill_rows(to, pitch, value.into(), 1, width, height)?)
    }

    fn cuMemsetD2D16_v2(to: DevicePointer, pitch: usize, value: u16, width: usize, height: usize) {
        aligned(to, 2)?;
        stream::run_synchronously(fill_rows(to, pitch, value.into(), 2, width, height)?)
    }

    fn cuMemsetD2D16Async(to: DevicePointer, pitch: usize, value: u16, width: usize, height: usize, stream: Handle) {
        aligned(to, 2)?;
        stream::submit(stream, fill_rows(to, pitch, value.into(), 2, width, height)?)
    }

    fn cuMemsetD2D32_v2(to: DevicePointer, pitch: usize, value: u32, width: usize, height: usize) {
        aligned(to, 4)?;
        stream::run_synchronously(fill_rows(to, pitch, value, 4, width, height)?)
    }

    fn cuMemsetD2D32Async(to: DevicePointer, pitch: usize, value: u32, width: usize, height: usize, stream: Handle) {
        aligned(to, 4)?;
        stream::submit(stream, fill_rows(to, pitch, value, 4, width, height)?)
    }
}
