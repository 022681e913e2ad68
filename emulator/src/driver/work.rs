//! What streams and graphs carry: kernels, copies, fills, host functions, events, memory of graphs.
//!
//! A work item holds everything it needs by value (parameters are packed when the call is made), so that a graph can
//! execute it many times. Only host pointers of copies stay pointers: as on a real driver, every launch of a graph
//! accesses the host memory named at capture.

use super::call::{self, Answer, Refusal, refuse};
use super::codes::Code;
use super::event::{self, Event, State};
use super::graph::{GraphExec, GraphMemory};
use super::launch::KernelLaunch;
use super::order;
use super::registered;
use super::settings::Run;
use super::state::{self, Context, Device, DevicePointer, Handle, Kind};
use super::stream::Stream;
use crate::exec::Span;
use crate::memory::MemoryError;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub enum Work {
    Kernel(KernelLaunch),
    Copy(Copy),
    Fill(Fill),
    Host(HostFunction),
    Record(Arc<Event>),
    /// In a graph: waits for the event as it is at the launch.
    Wait(Arc<Event>),
    Alloc(Arc<GraphMemory>),
    Free(Arc<GraphMemory>),
    Graph(Arc<GraphExec>),
    /// An empty node, for ordering only.
    Nothing,
}

#[derive(Clone, Copy)]
pub enum HostFunction {
    Plain { function: unsafe extern "C" fn(*mut c_void), data: usize },
    Callback { callback: unsafe extern "C" fn(Handle, Code, *mut c_void), stream: usize, data: usize },
}

impl HostFunction {
    pub fn call(self) {
        call::as_host_function(|| match self {
            // SAFETY: whoever submitted the function guarantees that it may be called with its data.
            HostFunction::Plain { function, data } => unsafe { function(data as *mut c_void) },
            HostFunction::Callback { callback, stream, data } => {
                // SAFETY: as above.
                unsafe { callback(stream as Handle, Code::SUCCESS, data as *mut c_void) }
            }
        });
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
pub enum Place {
    Host(usize),
    Device(DevicePointer),
}

/// A box of `width` bytes by `height` rows by `depth` slices.
#[derive(Clone, Copy)]
pub struct Copy {
    pub to: Place,
    pub from: Place,
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    /// Bytes from row to row and from slice to slice.
    pub to_pitch: usize,
    pub to_slice: usize,
    pub from_pitch: usize,
    pub from_slice: usize,
}

impl Copy {
    /// `bytes` contiguous bytes.
    pub fn line(to: Place, from: Place, bytes: usize) -> Copy {
        Copy {
            to,
            from,
            width: bytes,
            height: 1,
            depth: 1,
            to_pitch: bytes,
            to_slice: bytes,
            from_pitch: bytes,
            from_slice: bytes,
        }
    }

    fn run(&self, context: &Context) -> Answer {
        if self.width == 0 {
            return Ok(());
        }
        for slice in 0..self.depth {
            for row in 0..self.height {
                // Inside the address space, as whoever made the copy has checked.
                let to = self.to.offset(slice * self.to_slice + row * self.to_pitch);
                let from = self.from.offset(slice * self.from_slice + row * self.from_pitch);
                copy_bytes(context, to, from, self.width)?;
            }
        }
        Ok(())
    }

    /// Whether the call that submits it returns when it is done, even in a stream: from a device to host memory that is
    /// neither pinned nor registered.
    pub fn is_waited_for(&self) -> Answer<bool> {
        let Place::Host(to) = self.to.settled(self.width)? else { return Ok(false) };
        Ok(registered::find(to as u64)?.is_none() && matches!(self.from.settled(self.width)?, Place::Device(_)))
    }

    /// The rows on devices, which it reads and writes.
    fn spans(&self) -> Answer<Vec<Span>> {
        let mut spans = Vec::new();
        let ends =
            [(self.from, self.from_slice, self.from_pitch, false), (self.to, self.to_slice, self.to_pitch, true)];
        for (place, slice, pitch, write) in ends {
            for at in 0..self.depth * self.height {
                let row = place.offset(at / self.height * slice + at % self.height * pitch);
                if let Place::Device(first) = row.settled(self.width)? {
                    add_row(&mut spans, first, self.width, write);
                }
            }
        }
        Ok(spans)
    }
}

/// Adds a row of a copy or fill, to the one before if it follows on it.
fn add_row(spans: &mut Vec<Span>, first: DevicePointer, width: usize, write: bool) {
    let end = first + width as u64;
    match spans.last_mut() {
        Some(last) if last.write == write && last.end == first => last.end = end,
        _ => spans.push(Span { first, end, write, whole: true, strong: false }),
    }
}

/// `height` rows of `count` elements; the pattern is one element of 1, 2 or 4 bytes.
#[derive(Clone, Copy)]
pub struct Fill {
    pub to: DevicePointer,
    pub pattern: [u8; 4],
    pub element: usize,
    pub count: usize,
    pub height: usize,
    pub pitch: usize,
}

impl Fill {
    fn run(&self, context: &Context) -> Answer {
        if self.count == 0 {
            return Ok(());
        }
        let width = self.count * self.element;
        for row in 0..self.height {
            // Inside the address space, as whoever made the fill has checked.
            let to = self.to + (row * self.pitch) as u64;
            if let Some(host) = registered::behind(to, width) {
                // SAFETY: a program keeps memory allocated while it is registered, and all these bytes are registered.
                let target = unsafe { std::slice::from_raw_parts_mut(host as *mut u8, width) };
                target.chunks_exact_mut(self.element).for_each(|to| to.copy_from_slice(&self.pattern[..self.element]));
            } else {
                let memory = &home(context, to)?.memory;
                let pattern = &self.pattern[..self.element];
                memory.set(to, pattern, self.count as u64).map_err(from_memory)?;
            }
        }
        Ok(())
    }

    /// The rows, which it writes.
    fn spans(&self) -> Vec<Span> {
        let (mut spans, width) = (Vec::new(), self.count * self.element);
        (0..self.height).for_each(|row| add_row(&mut spans, self.to + (row * self.pitch) as u64, width, true));
        spans
    }
}

impl Place {
    fn offset(self, bytes: usize) -> Place {
        match self {
            Place::Host(address) => Place::Host(address + bytes),
            Place::Device(address) => Place::Device(address + bytes as u64),
        }
    }

    /// A device place stays one, unless registered host memory is behind its `bytes`. A host place in memory of one of
    /// the driver's devices becomes a device place, if the host may access it.
    fn settled(self, bytes: usize) -> Answer<Place> {
        let address = match self {
            Place::Host(address) => address,
            Place::Device(address) => {
                return Ok(registered::behind(address, bytes).map_or(self, Place::Host));
            }
        };
        match state::device_of(address as u64) {
            None => Ok(self),
            Some((_, _, owned)) if matches!(owned.kind, Kind::Host(_) | Kind::Managed) => {
                Ok(Place::Device(address as u64))
            }
            Some(_) => {
                refuse(Code::INVALID_VALUE, format!("{address:#x} was passed as a host pointer, but is device memory"))
            }
        }
    }
}

pub fn from_memory(why: MemoryError) -> Refusal {
    Refusal { code: Code(why.code as i32), message: why.message }
}

/// The device whose memory holds `address`; the context's own if none does, so that its memory names the nearest
/// allocation.
fn home(context: &Context, address: DevicePointer) -> Answer<&'static Device> {
    let devices = &state::driver()?.devices;
    match devices.iter().find(|device| device.memory.owns(address)) {
        Some(device) => Ok(device),
        None => context.device(),
    }
}

fn copy_bytes(context: &Context, to: Place, from: Place, bytes: usize) -> Answer {
    if isize::try_from(bytes).is_err() {
        return refuse(Code::INVALID_VALUE, format!("{bytes} bytes are more than any memory has"));
    }
    match (to.settled(bytes)?, from.settled(bytes)?) {
        (Place::Host(to), Place::Host(from)) => {
            // SAFETY: the caller of the copy guarantees both host ranges; `copy` allows overlap.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            Ok(())
        }
        (Place::Device(to), Place::Host(from)) => {
            // SAFETY: the caller of the copy guarantees that the host range is readable.
            let source = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
            let memory = &home(context, to)?.memory;
            memory.copy_in(to, source).map_err(from_memory)
        }
        (Place::Host(to), Place::Device(from)) => {
            // SAFETY: the caller of the copy guarantees that the host range is writable.
            let target = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            let memory = &home(context, from)?.memory;
            memory.copy_out(from, target).map_err(from_memory)
        }
        (Place::Device(to), Place::Device(from)) => {
            let (target, source) = (home(context, to)?, home(context, from)?);
            if target.ordinal == source.ordinal {
                return target.memory.copy_within(to, from, bytes as u64).map_err(from_memory);
            }
            let mut between = vec![0; bytes];
            source.memory.copy_out(from, &mut between).map_err(from_memory)?;
            target.memory.copy_in(to, &between).map_err(from_memory)
        }
    }
}

impl Work {
    /// Executes the work now, on this thread. Host functions come here from graphs only, not from streams.
    pub fn run(&self, context: &Context, stream: &Stream, run: &Run) -> Answer {
        match self {
            Work::Kernel(launch) => launch.run(context, stream, run),
            Work::Copy(copy) => {
                copy.run(context)?;
                let spans = if run.stream_order && copy.width > 0 { copy.spans()? } else { Vec::new() };
                order::access(context, stream, run, &self.describe(), true, &spans)
            }
            Work::Fill(fill) => {
                fill.run(context)?;
                let spans = if run.stream_order && fill.count > 0 { fill.spans() } else { Vec::new() };
                order::access(context, stream, run, &self.describe(), true, &spans)
            }
            Work::Host(function) => {
                order::host_waited(stream)?;
                let function = *function;
                let thread = std::thread::spawn(move || function.call());
                // The function's panic has already been printed.
                let _ = thread.join();
                Ok(())
            }
            Work::Record(event) => event.stamp(stream),
            Work::Wait(event) => match event::state_of(event) {
                State::Recorded { clock, .. } => order::wait(stream, &clock),
                _ => Ok(()),
            },
            Work::Alloc(memory) => memory.come_alive(),
            Work::Free(memory) => {
                if memory.live.swap(false, Ordering::Relaxed) {
                    return Ok(());
                }
                refuse(Code::INVALID_VALUE, format!("memory of a graph at {:#x} was freed twice", memory.address))
            }
            Work::Graph(exec) => exec.run(context, stream, run),
            Work::Nothing => Ok(()),
        }
    }

    /// CUgraphNodeType.
    pub fn node_type(&self) -> i32 {
        match self {
            Work::Kernel(_) => 0,
            Work::Copy(_) => 1,
            Work::Fill(_) => 2,
            Work::Host(_) => 3,
            Work::Graph(_) => 4,
            Work::Nothing => 5,
            Work::Wait(_) => 6,
            Work::Record(_) => 7,
            Work::Alloc(_) => 10,
            Work::Free(_) => 11,
        }
    }

    pub fn describe(&self) -> String {
        match self {
            Work::Kernel(launch) => launch.describe(),
            Work::Copy(copy) => format!("copy {}x{}x{}", copy.width, copy.height, copy.depth),
            Work::Fill(fill) => format!("fill {}x{}", fill.count * fill.element, fill.height),
            Work::Host(_) => "host function".into(),
            Work::Graph(_) => "graph".into(),
            Work::Nothing => "empty".into(),
            Work::Record(_) => "record event".into(),
            Work::Wait(_) => "wait for event".into(),
            Work::Alloc(memory) => format!("allocate {}", memory.bytes),
            Work::Free(memory) => format!("free {}", memory.bytes),
        }
    }
}

impl GraphMemory {
    /// Executes the allocation node: the memory exists, unwritten.
    fn come_alive(&self) -> Answer {
        if self.live.swap(true, Ordering::Relaxed) {
            return refuse(
                Code::INVALID_VALUE,
                format!(
                    "memory of a graph at {:#x} is still allocated from an earlier launch: free it, or instantiate \
                     with AUTO_FREE_ON_LAUNCH",
                    self.address
                ),
            );
        }
        let device = state::device(self.device)?;
        order::forget_memory(self.address)?;
        device.memory.forget(self.address).map_err(from_memory)
    }
}
